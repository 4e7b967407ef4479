"""Torch reference of the queries that read latents."""

from __future__ import annotations

import torch
from torch import Tensor


def latent_queries_naive(
    query: Tensor,
    heads: Tensor,
    key_map: Tensor,
    key_bias: Tensor,
    cosine: Tensor,
    sine: Tensor,
    is_interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    """``folded`` and ``bias``; arguments as in ``latent_queries``."""
    content = _unrotated(query[:, heads], cosine[:, None], sine[:, None], is_interleaved)
    content = content.unflatten(1, (key_map.shape[1], -1))
    folded = torch.einsum("nhgd,shdc->nhgsc", content, key_map).flatten(1, 2)
    precise = torch.promote_types(query.dtype, torch.float32)
    bias = torch.einsum("nhgd,shd->nhgs", content.to(precise), key_bias.to(precise)).flatten(1, 2)
    return folded, bias


def _unrotated(states: Tensor, cosine: Tensor, sine: Tensor, is_interleaved: bool) -> Tensor:
    size = cosine.shape[-1]
    turned, rest = states[..., :size], states[..., size:]
    if is_interleaved:
        crossed = torch.stack([-turned[..., 1::2], turned[..., ::2]], dim=-1).flatten(-2)
    else:
        crossed = torch.cat([-turned[..., size // 2 :], turned[..., : size // 2]], dim=-1)
    return torch.cat([(turned * cosine - crossed * sine).to(states.dtype), rest], dim=-1)
