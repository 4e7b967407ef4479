"""Decode attention over a growing stream, in pages or in one piece, and a bounded window, in one softmax."""

from __future__ import annotations

from torch import Tensor

from photon_kernels._backend import (
    check_attention_shapes,
    check_backend,
    check_integers,
    check_rows,
    check_triton_inputs,
)
from photon_kernels.summary_decode.naive import Window, summary_decode_attention_naive

__all__ = ["Window", "summary_decode_attention", "summary_decode_attention_naive"]


def summary_decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    scale: float,
    starts: Tensor | None = None,
    unit_bias: Tensor | None = None,
    rows: Tensor | None = None,
    pages: Tensor | None = None,
    window: Window | None = None,
    return_lse: bool = False,
    num_splits: int | None = None,
    backend: str = "torch",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend from a few queries per row to the first units of a long stream and to a window, in one softmax.

    A unit is whatever the stream has one key and value for: a chunk's summary, or a token in a full-attention layer.

    Args:
        q: Queries ``[B, Hq, Q, D]``; query head ``h`` reads key head ``h // (Hq / Hkv)``.
        k: Keys ``[Bc, Hkv, U, D]``; with ``pages``, ``[number of pages, Hkv, units per page, D]``. What a unit holds
            that no query of the row sees (NaN included) has no influence.
        v: Values, like ``k``.
        lengths: Integer ``[B, Q]``, the number of units that each query sees, 0 to U.
        scale: Factor on the dot products, usually ``D ** -0.5``.
        starts: Optional integer ``[B, Q]``, the first unit that each query sees; ``None`` for 0.
        unit_bias: Optional float32 ``[U]`` added to the scaled dot products: the logarithm of the number of tokens
            that a unit stands for.
        rows: Integer ``[B]``, the row of the stream (of ``pages``, of the window) that each row of queries reads;
            ``None`` for its own.
        pages: Optional integer ``[Br, W]``: unit ``u`` of row ``r`` lies in page ``pages[r, u // E]`` at ``u % E``,
            where E is the number of units per page; then U is ``W * E``. Entries beyond a row's length are not read.
        window: Optional entries of a ring buffer, which the same softmax holds.
        return_lse: Return the log-sum-exp of the logits too.
        num_splits: Parts into which the Triton kernel cuts each row, to keep a GPU busy when there are few rows;
            ``None`` chooses. It changes rounding only. The torch backend ignores it.
        backend: ``"torch"`` (any device, differentiable) or ``"triton"`` (GPU, forward only).

    Returns:
        The output ``[B, Hq, Q, D]`` in q's dtype; with ``return_lse`` also float32 ``[B, Hq, Q]``, the natural
        logarithm of the softmax denominator. A query that sees nothing gets 0 and -inf.

    Raises:
        ValueError: Shapes or dtypes do not fit together, ``num_splits`` is not positive, or the backend is unknown.
        RuntimeError: Triton cannot run on these inputs; the message says why.
    """
    check_backend(backend)
    check_attention_shapes(q, k, v)
    batch, num_positions = q.shape[0], q.shape[2]
    if pages is not None:
        check_integers("pages", pages, pages.shape[0], *pages.shape[1:2])
    check_rows(rows, batch, k.shape[0] if pages is None else pages.shape[0])
    check_integers("lengths", lengths, batch, num_positions)
    if starts is not None:
        check_integers("starts", starts, batch, num_positions)
    num_units = k.shape[2] if pages is None else pages.shape[1] * k.shape[2]
    if unit_bias is not None and unit_bias.shape != (num_units,):
        raise ValueError(f"unit_bias must be [{num_units}], one number per unit, got {list(unit_bias.shape)}")
    if window is not None:
        _check_window(window, q, rows)
    if num_splits is not None and num_splits < 1:
        raise ValueError(f"num_splits must be at least 1, got {num_splits}")
    arguments = q, k, v, lengths, scale, starts, unit_bias, rows, pages, window
    if backend == "torch":
        out, lse = summary_decode_attention_naive(*arguments)
    else:
        check_triton_inputs(q, k, v, lengths, starts, unit_bias, rows, pages, *(window or ())[:5])
        from photon_kernels.summary_decode.triton import summary_decode_attention_triton

        out, lse = summary_decode_attention_triton(*arguments, num_splits)
    return (out, lse) if return_lse else out


def _check_window(window: Window, q: Tensor, rows: Tensor | None) -> None:
    check_attention_shapes(q, window.k, window.v)
    check_rows(rows, q.shape[0], window.k.shape[0])
    check_integers("window.order", window.order, window.k.shape[0], window.k.shape[2])
    check_integers("window.first_visible", window.first_visible, q.shape[0])
    check_integers("window.last_visible", window.last_visible, q.shape[0], q.shape[2])
