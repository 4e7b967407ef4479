"""The definition that both decode attentions share: softmax over the visible entries of a cache."""

from __future__ import annotations

import torch
from torch import Tensor


def masked_attention(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of one query per row over the entries it may see.

    What an invisible entry holds (NaN included) has no influence. Arithmetic is in float32, or float64 for float64
    inputs.

    Args:
        q: Queries ``[B, Hq, D]``; query head ``h`` reads key head ``h // (Hq / Hkv)``.
        k: Keys ``[B, Hkv, N, D]``.
        v: Values ``[B, Hkv, N, D]``.
        visible: bool ``[B, N]``.
        scale: Factor on the dot products.
        bias: Optional ``[N]``, added to the scaled dot products.

    Returns:
        The output ``[B, Hq, D]`` in q's dtype, and the natural logarithm of the softmax denominator ``[B, Hq]`` in the
        dtype of the arithmetic. A row that sees nothing gives 0 and -inf.
    """
    accumulate = torch.promote_types(q.dtype, torch.float32)
    batch, num_heads, head_dim = q.shape
    grouped = q.to(accumulate).reshape(batch, k.shape[1], num_heads // k.shape[1], head_dim)
    # Zeroed, not only masked: 0 * NaN is NaN.
    keys = k.to(accumulate).masked_fill(~visible[:, None, :, None], 0.0)
    values = v.to(accumulate).masked_fill(~visible[:, None, :, None], 0.0)

    logits = torch.einsum("bhgd,bhnd->bhgn", grouped, keys) * scale
    if bias is not None:
        logits = logits + torch.where(visible, bias.to(accumulate), 0.0)[:, None, None, :]
    logits = logits.masked_fill(~visible[:, None, None, :], float("-inf"))
    lse = torch.logsumexp(logits, dim=-1)
    weights = torch.exp(logits - lse.masked_fill(lse == float("-inf"), 0.0)[..., None])
    out = torch.einsum("bhgn,bhnd->bhgd", weights, values)
    return out.reshape(batch, num_heads, head_dim).to(q.dtype), lse.reshape(batch, num_heads)
