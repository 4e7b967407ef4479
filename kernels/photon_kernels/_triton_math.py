"""Device functions that several Triton kernels share."""

from __future__ import annotations

import triton
import triton.language as tl

# Read once: whether kernels are interpreted is decided when they are decorated.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def dot(a, b, acc):
    """``acc + a @ b`` in float32; ``a`` is first rounded to b's dtype, as the tensor cores want it."""
    if INTERPRETED:
        # The interpreter keeps bfloat16 as bit patterns and would multiply those.
        return acc + tl.dot(a.to(tl.float32), b.to(tl.float32))
    # "ieee" touches float32 operands only: the default there is tf32, with 10 bits of mantissa.
    return tl.dot(a.to(b.dtype), b, acc, input_precision="ieee")


@triton.jit
def attend_tile(queries, keys, values, offset, scale_log2, peak, total, acc):
    """One step of the online softmax over a tile of keys and values.

    Args:
        queries: ``[M, D]``.
        keys, values: ``[N, D]``, finite everywhere: zero where no query sees them.
        offset: float32 ``[M, N]`` added to the logits in base 2; -inf where the query does not see the key.
        scale_log2: Factor on the dot products, times log2(e).
        peak, total: float32 ``[M]``, the largest logit so far and the sum of ``2 ** (logit - peak)``.
        acc: float32 ``[M, D]``, the weighted sum of values so far.

    Returns:
        The new ``peak``, ``total`` and ``acc``.
    """
    products = dot(queries, tl.trans(keys), tl.zeros([queries.shape[0], keys.shape[0]], tl.float32))
    logits = products * scale_log2 + offset
    new_peak = tl.maximum(peak, tl.max(logits, 1))
    # While nothing has been seen the peak is -inf, and -inf - -inf would be NaN.
    shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    weights = tl.exp2(logits - shift[:, None])
    decay = tl.exp2(peak - shift)
    total = total * decay + tl.sum(weights, 1)
    acc = dot(weights, values, acc * decay[:, None])
    return new_peak, total, acc


@triton.jit
def finish_softmax(peak, total, acc):
    """Output ``[M, D]`` and natural log-sum-exp ``[M]``; 0 and -inf where nothing was seen."""
    # The peak is still -inf where the total is 0, and so is their log-sum-exp.
    divisor = tl.where(total == 0.0, 1.0, total)
    return acc / divisor[:, None], (peak + tl.log2(divisor)) * LN_2
