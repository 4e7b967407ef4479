"""Decode attention over a bounded ring buffer: window and sinks."""

from __future__ import annotations

from torch import Tensor

from photon_kernels._backend import (
    check_attention_shapes,
    check_backend,
    check_integers,
    check_rows,
    check_triton_inputs,
)
from photon_kernels.window_decode.naive import window_decode_attention_naive

__all__ = ["window_decode_attention", "window_decode_attention_naive"]


def window_decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    first_visible: Tensor,
    last_visible: Tensor,
    scale: float,
    num_sinks: int = 0,
    rows: Tensor | None = None,
    return_lse: bool = False,
    backend: str = "torch",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend from a few queries per row to the visible slots of a ring buffer, in whatever order elements lie.

    Slot ``n`` of cache row ``r`` is visible to query ``i`` of row ``b`` if ``0 <= index[r, n] <= last_visible[b, i]``
    and either ``index[r, n] >= first_visible[b]`` or ``n < num_sinks``.

    Args:
        q: Queries ``[B, Hq, Q, D]``; query head ``h`` reads key head ``h // (Hq / Hkv)``. Q is 1 for a token, R for the
            slots of a chunk.
        k: Keys ``[Bc, Hkv, N, D]``. What a slot holds that no query of the row sees (NaN included) has no influence.
        v: Values ``[Bc, Hkv, N, D]``.
        index: Integer ``[Bc, N]``, the sequence index of the element in each slot; -1 marks an empty slot.
        first_visible: Integer ``[B]``, the first index that each row's queries see besides the sinks.
        last_visible: Integer ``[B, Q]``, the last index that each query sees, usually its own.
        scale: Factor on the dot products, usually ``D ** -0.5``.
        num_sinks: The first so many slots of the buffer are never too old.
        rows: Integer ``[B]``, the cache row that each row of queries reads; ``None`` for its own (then Bc = B).
        return_lse: Return the log-sum-exp of the logits too.
        backend: ``"torch"`` (any device, differentiable) or ``"triton"`` (GPU, forward only).

    Returns:
        The output ``[B, Hq, Q, D]`` in q's dtype; with ``return_lse`` also float32 ``[B, Hq, Q]``, the natural
        logarithm of the softmax denominator. A query that sees nothing gets 0 and -inf.

    Raises:
        ValueError: Shapes or dtypes do not fit together, or the backend is unknown.
        RuntimeError: Triton cannot run on these inputs; the message says why.
    """
    check_backend(backend)
    check_attention_shapes(q, k, v)
    batch, num_positions = q.shape[0], q.shape[2]
    check_rows(rows, batch, k.shape[0])
    check_integers("index", index, k.shape[0], k.shape[2])
    check_integers("first_visible", first_visible, batch)
    check_integers("last_visible", last_visible, batch, num_positions)
    arguments = q, k, v, index, first_visible, last_visible, scale, num_sinks, rows
    if backend == "torch":
        out, lse = window_decode_attention_naive(*arguments)
    else:
        check_triton_inputs(q, k, v, index, first_visible, last_visible, rows)
        from photon_kernels.window_decode.triton import window_decode_attention_triton

        out, lse = window_decode_attention_triton(*arguments)
    return (out, lse) if return_lse else out
