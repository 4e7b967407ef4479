"""Torch reference of the windowed decode attention."""

from __future__ import annotations

import torch
from torch import Tensor

from photon_kernels._reference import masked_attention


def visible_in_window(index: Tensor, first_visible: Tensor, last_visible: Tensor, num_sinks: int) -> Tensor:
    """Which slots each query sees, bool ``[B, Q, N]``, for ``index [B, N]``."""
    is_sink = torch.arange(index.shape[1], device=index.device) < num_sinks
    index = index[:, None]
    known = (index >= 0) & (index <= last_visible[:, :, None])
    return known & ((index >= first_visible[:, None, None]) | is_sink)


def window_decode_attention_naive(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    first_visible: Tensor,
    last_visible: Tensor,
    scale: float,
    num_sinks: int = 0,
    rows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Output ``[B, Hq, Q, D]`` and log-sum-exp ``[B, Hq, Q]``; arguments as in ``window_decode_attention``."""
    if rows is not None:
        k, v, index = k[rows], v[rows], index[rows]
    return masked_attention(q, k, v, visible_in_window(index, first_visible, last_visible, num_sinks), scale)
