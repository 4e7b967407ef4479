"""The definition that the decode attentions share: softmax over the visible entries of a cache."""

from __future__ import annotations

import torch
from torch import Tensor


def masked_attention(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of the queries of each row over the entries they may see.

    What an entry holds that no query of its row sees (NaN included) has no influence. Arithmetic is in float32, or
    float64 for float64 inputs.

    Args:
        q: Queries ``[B, Hq, Q, D]``; query head ``h`` reads key head ``h // (Hq / Hkv)``.
        k: Keys ``[B, Hkv, N, D]``.
        v: Values ``[B, Hkv, N, D]``.
        visible: bool ``[B, Q, N]``.
        scale: Factor on the dot products.
        bias: Optional ``[N]``, added to the scaled dot products.

    Returns:
        The output ``[B, Hq, Q, D]`` in q's dtype, and the natural logarithm of the softmax denominator ``[B, Hq, Q]``
        in the dtype of the arithmetic. A query that sees nothing gives 0 and -inf.
    """
    accumulate = torch.promote_types(q.dtype, torch.float32)
    grouped = q.to(accumulate).unflatten(1, (k.shape[1], -1))
    # Zeroed, not only masked: 0 * NaN is NaN.
    unseen = ~visible.any(dim=1)[:, None, :, None]
    keys = k.to(accumulate).masked_fill(unseen, 0.0)
    values = v.to(accumulate).masked_fill(unseen, 0.0)

    logits = torch.einsum("bhgqd,bhnd->bhgqn", grouped, keys) * scale
    if bias is not None:
        logits = logits + torch.where(visible, bias.to(accumulate), 0.0)[:, None, None]
    logits = logits.masked_fill(~visible[:, None, None], float("-inf"))
    lse = torch.logsumexp(logits, dim=-1)
    weights = torch.exp(logits - lse.masked_fill(lse == float("-inf"), 0.0)[..., None])
    out = torch.einsum("bhgqn,bhnd->bhgqd", weights, values)
    return out.flatten(1, 2).to(q.dtype), lse.flatten(1, 2)
