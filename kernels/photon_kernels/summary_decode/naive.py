"""Torch reference of the decode attention over summaries."""

from __future__ import annotations

import torch
from torch import Tensor

from photon_kernels._masked_attention import masked_attention


def summary_decode_attention_naive(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    scale: float,
    unit_bias: Tensor | None = None,
    rows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Output ``[B, Hq, D]`` and log-sum-exp ``[B, Hq]``; arguments as in ``summary_decode_attention``."""
    if rows is not None:
        k, v = k[rows], v[rows]
    visible = torch.arange(k.shape[2], device=k.device) < lengths[:, None]
    return masked_attention(q, k, v, visible, scale, unit_bias)
