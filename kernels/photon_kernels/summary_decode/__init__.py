"""Decode attention of one query per row over a growing stream of summaries."""

from __future__ import annotations

from torch import Tensor

from photon_kernels._backend import check_attention_shapes, check_backend, check_triton_inputs, check_vector
from photon_kernels.summary_decode.naive import summary_decode_attention_naive

__all__ = ["summary_decode_attention", "summary_decode_attention_naive"]


def summary_decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    scale: float,
    unit_bias: Tensor | None = None,
    rows: Tensor | None = None,
    return_lse: bool = False,
    num_splits: int | None = None,
    backend: str = "torch",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend from one query per row to the first ``lengths[b]`` units of a long stream.

    Args:
        q: Queries ``[B, Hq, D]``; query head ``h`` reads key head ``h // (Hq / Hkv)``.
        k: Keys ``[Bc, Hkv, U, D]``. What lies beyond a row's length (NaN included) has no influence.
        v: Values ``[Bc, Hkv, U, D]``.
        lengths: Integer ``[B]``, the number of units that each query sees, 0 to U.
        scale: Factor on the dot products, usually ``D ** -0.5``.
        unit_bias: Optional float32 ``[U]`` added to the scaled dot products: the logarithm of the number of tokens
            that a unit stands for.
        rows: Integer ``[B]``, the cache row that each query reads; ``None`` for row ``b`` (then Bc = B).
        return_lse: Return the log-sum-exp of the logits too, as ``merge_attention`` wants it.
        num_splits: Parts into which the Triton kernel cuts each row's units, to keep a GPU busy when there are few
            rows; ``None`` chooses. It changes rounding only. The torch backend ignores it.
        backend: ``"torch"`` (any device, differentiable) or ``"triton"`` (GPU, forward only).

    Returns:
        The output ``[B, Hq, D]`` in q's dtype; with ``return_lse`` also float32 ``[B, Hq]``, the natural logarithm of
        the softmax denominator. A query that sees nothing gets 0 and -inf.

    Raises:
        ValueError: Shapes or dtypes do not fit together, ``num_splits`` is not positive, or the backend is unknown.
        RuntimeError: Triton cannot run on these inputs; the message says why.
    """
    check_backend(backend)
    check_attention_shapes(q, k, v, rows)
    check_vector("lengths", lengths, q.shape[0])
    if unit_bias is not None and unit_bias.shape != (k.shape[2],):
        raise ValueError(f"unit_bias must be [{k.shape[2]}], one number per unit, got {list(unit_bias.shape)}")
    if num_splits is not None and num_splits < 1:
        raise ValueError(f"num_splits must be at least 1, got {num_splits}")
    if backend == "torch":
        out, lse = summary_decode_attention_naive(q, k, v, lengths, scale, unit_bias, rows)
    else:
        check_triton_inputs(q, k, v, lengths, unit_bias, rows)
        from photon_kernels.summary_decode.triton import summary_decode_attention_triton

        out, lse = summary_decode_attention_triton(q, k, v, lengths, scale, unit_bias, rows, num_splits)
    return (out, lse) if return_lse else out
