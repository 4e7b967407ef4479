"""Torch reference of the windowed decode attention."""

from __future__ import annotations

import torch
from torch import Tensor

from photon_kernels._reference import masked_attention


def visible_in_window(order: Tensor, first_visible: Tensor, last_visible: Tensor, num_sinks: int) -> Tensor:
    """Which entries each query sees, bool ``[B, Q, N]``, for ``order [B, N]``."""
    place = order[:, None]
    is_sink = torch.arange(order.shape[1], device=order.device) < num_sinks
    old_enough = (place >= 0) & (place <= last_visible[:, :, None])
    return old_enough & ((place >= first_visible[:, None, None]) | is_sink)


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
    """Output ``[B, Hq, Q, D]`` and log-sum-exp ``[B, Hq, Q]``; arguments as in ``window_decode_attention``."""
    if rows is not None:
        k, v, order = k[rows], v[rows], order[rows]
    return masked_attention(q, k, v, visible_in_window(order, first_visible, last_visible, num_sinks), scale)
