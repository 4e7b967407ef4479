"""Torch reference of the windowed decode attention."""

from __future__ import annotations

import torch
from torch import Tensor

from photon_kernels._masked_attention import masked_attention


def window_decode_attention_naive(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    order: Tensor,
    first_visible: Tensor,
    last_visible: Tensor,
    scale: float,
    num_sinks: int = 0,
    rows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Output ``[B, Hq, D]`` and log-sum-exp ``[B, Hq]``; arguments as in ``window_decode_attention``."""
    if rows is not None:
        k, v, order = k[rows], v[rows], order[rows]
    is_sink = torch.arange(k.shape[2], device=k.device) < num_sinks
    visible = (order >= 0) & (order <= last_visible[:, None]) & ((order >= first_visible[:, None]) | is_sink)
    return masked_attention(q, k, v, visible, scale)
