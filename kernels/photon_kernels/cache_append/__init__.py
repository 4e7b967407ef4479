"""Append to caches at several rates in one launch: tokens, units of each level, open chunks; rings and blocks."""

from __future__ import annotations

from collections.abc import Sequence

from photon_kernels._backend import check_backend, check_integers, check_triton_inputs
from photon_kernels.cache_append.naive import Append, cache_append_naive

__all__ = ["Append", "cache_append", "cache_append_naive"]


def cache_append(appends: Sequence[Append], backend: str = "torch") -> None:
    """Store new states in caches, in place; a state whose slot is negative is skipped.

    Level l appends at 1 / S_l of the tokens' rate. Which rows of a step do so need not be known on the host: give
    those that do not a slot of -1.

    Args:
        appends: What goes where; see `Append`. All have the same rows n of the step and the same dtypes; shapes and
            layouts may differ. No two of them may write different states to one slot.
        backend: ``"torch"`` (any device) or ``"triton"`` (GPU, one launch for up to eight of `appends`).

    Raises:
        ValueError: Shapes or dtypes do not fit together, or the backend is unknown.
        RuntimeError: Triton cannot run on these inputs; the message says why.
    """
    check_backend(backend)
    for append in appends:
        _check(append)
    kinds = {(len(append.source), append.source.dtype, append.target.dtype) for append in appends}
    if len(kinds) > 1:
        raise ValueError(
            "all appends must have the same number of rows and the same dtypes, got (rows, source dtype, target dtype) "
            f"{sorted(kinds, key=str)}"
        )
    if backend == "torch":
        cache_append_naive(appends)
    elif appends:
        check_triton_inputs(*(tensor for append in appends for tensor in append))
        from photon_kernels.cache_append.triton import cache_append_triton

        cache_append_triton(appends)


def _check(append: Append) -> None:
    source, target, rows, slots, block_table = append
    if source.dim() != 4 or target.dim() != 4 or source.shape[1::2] != target.shape[1::2]:
        raise ValueError(
            f"expected a source [n, H, Q, D] and a target [R, H, N, D], got {tuple(source.shape)}, "
            f"{tuple(target.shape)}"
        )
    check_integers("rows", rows, source.shape[0])
    check_integers("slots", slots, source.shape[0], source.shape[2])
    if block_table is not None:
        check_integers("block_table", block_table, *block_table.shape[:2])
