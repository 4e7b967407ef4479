"""Decode attention over a growing store or a sliding window with sinks, in blocks or in one piece."""

from __future__ import annotations

from torch import Tensor

from photon_kernels._backend import (
    check_attention_shapes,
    check_backend,
    check_integers,
    check_rows,
    check_triton_inputs,
)
from photon_kernels.paged_decode.naive import paged_decode_attention_naive

__all__ = ["paged_decode_attention", "paged_decode_attention_naive"]


def paged_decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Tensor,
    scale: float,
    rows: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
    start: Tensor | None = None,
    num_sinks: int = 0,
    return_lse: bool = False,
    backend: str = "torch",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend from a few queries per row to the first elements of a store, or to a window of them and sinks.

    Args:
        q: Queries ``[B, Hq, Q, D]``; query head ``h`` reads key head ``h // (Hq / Hkv)``.
        k: Keys ``[Bc, Hkv, N, D]``; with ``block_table``, ``[blocks, Hkv, elements per block, D]``. What an
            element holds that no query of the row sees (NaN included) has no influence.
        v: Values, like ``k``.
        seen: Integer ``[B, Q]``, the number of elements that each query sees, 0 to N.
        scale: Factor on the dot products, usually ``D ** -0.5``.
        rows: Integer ``[B]``, the row of the store (of ``block_table``) that each row of queries reads; ``None``: its
            own. A row may be read by several.
        block_table: Optional integer ``[Br, W]``: element n of row r is in block ``block_table[r, n // E]`` at index
            ``n % E``, where E is the number of elements per block; then N is ``W * E``. What the table holds beyond the
            elements that a row's queries see is not read.
        num_splits: Pieces into which the Triton kernel splits each row, to keep a GPU busy when there are few rows;
            ``None`` chooses. It changes rounding only. The torch backend ignores it.
        start: Integer ``[B, Q]``, the first element of each query's window; ``None``: 0. What lies before every window
            of a row, sinks aside, is not read, nor are its entries of the table.
        num_sinks: First elements that queries see beside their window.
        return_lse: Also give the natural logarithm of the softmax denominator, to merge with other elements.
        backend: ``"torch"`` (any device, differentiable) or ``"triton"`` (GPU, forward only).

    Returns:
        ``[B, Hq, Q, D]`` in q's dtype; with `return_lse` also ``[B, Hq, Q]`` in fp32. A query that sees nothing gets 0
        (and -inf).

    Raises:
        ValueError: Shapes or dtypes do not fit together, ``num_splits`` is not positive, ``num_sinks`` negative, or the
            backend is unknown.
        RuntimeError: Triton cannot run on these inputs; the message says why.
    """
    check_backend(backend)
    check_attention_shapes(q, k, v)
    if block_table is not None:
        check_integers("block_table", block_table, block_table.shape[0], *block_table.shape[1:2])
    check_rows(rows, q.shape[0], k.shape[0] if block_table is None else block_table.shape[0])
    check_integers("seen", seen, q.shape[0], q.shape[2])
    if start is not None:
        check_integers("start", start, q.shape[0], q.shape[2])
    if num_sinks < 0:
        raise ValueError(f"num_sinks must not be negative, got {num_sinks}")
    if num_splits is not None and num_splits < 1:
        raise ValueError(f"num_splits must be at least 1, got {num_splits}")
    arguments, window = (q, k, v, seen, scale, rows, block_table), {"start": start, "num_sinks": num_sinks}
    if backend == "torch":
        found = paged_decode_attention_naive(*arguments, **window)
    else:
        check_triton_inputs(q, k, v, seen, rows, block_table, start)
        from photon_kernels.paged_decode.triton import paged_decode_attention_triton

        found = paged_decode_attention_triton(*arguments, num_splits, **window)
    return found if return_lse else found[0]
