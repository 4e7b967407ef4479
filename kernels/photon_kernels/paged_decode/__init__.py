"""Decode attention over a growing store, in blocks or in one piece."""

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
    backend: str = "torch",
) -> Tensor:
    """Attend from a few queries per row to the first elements of a store that grows with the text.

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
        backend: ``"torch"`` (any device, differentiable) or ``"triton"`` (GPU, forward only).

    Returns:
        ``[B, Hq, Q, D]`` in q's dtype. A query that sees nothing gets 0.

    Raises:
        ValueError: Shapes or dtypes do not fit together, ``num_splits`` is not positive, or the backend is unknown.
        RuntimeError: Triton cannot run on these inputs; the message says why.
    """
    check_backend(backend)
    check_attention_shapes(q, k, v)
    if block_table is not None:
        check_integers("block_table", block_table, block_table.shape[0], *block_table.shape[1:2])
    check_rows(rows, q.shape[0], k.shape[0] if block_table is None else block_table.shape[0])
    check_integers("seen", seen, q.shape[0], q.shape[2])
    if num_splits is not None and num_splits < 1:
        raise ValueError(f"num_splits must be at least 1, got {num_splits}")
    arguments = q, k, v, seen, scale, rows, block_table
    if backend == "torch":
        return paged_decode_attention_naive(*arguments)
    check_triton_inputs(q, k, v, seen, rows, block_table)
    from photon_kernels.paged_decode.triton import paged_decode_attention_triton

    return paged_decode_attention_triton(*arguments, num_splits)
