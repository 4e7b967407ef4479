"""Torch reference of the decode attention over summaries."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from photon_kernels._masked_attention import masked_attention
from photon_kernels.window_decode.naive import visible_in_window


class Window(NamedTuple):
    """A ring buffer that is attended to beside a stream; fields as in ``window_decode_attention``."""

    k: Tensor
    v: Tensor
    order: Tensor
    first_visible: Tensor
    last_visible: Tensor
    num_sinks: int = 0


def summary_decode_attention_naive(
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
) -> tuple[Tensor, Tensor]:
    """Output ``[B, Hq, Q, D]`` and log-sum-exp ``[B, Hq, Q]``; arguments as in ``summary_decode_attention``."""
    if pages is not None:
        pages = pages if rows is None else pages[rows]
        # Beyond a row's length the table may hold anything.
        used = torch.arange(pages.shape[1], device=k.device) * k.shape[2] < lengths.amax(dim=1, keepdim=True)
        pages = torch.where(used, pages, 0)
        k, v = (x[pages].transpose(1, 2).flatten(2, 3) for x in (k, v))
    elif rows is not None:
        k, v = k[rows], v[rows]
    unit = torch.arange(k.shape[2], device=k.device)
    visible = unit < lengths[:, :, None]
    if starts is not None:
        visible = visible & (unit >= starts[:, :, None])
    if window is not None:
        near_k, near_v, order = (x if rows is None else x[rows] for x in window[:3])
        k, v = torch.cat([near_k, k], dim=2), torch.cat([near_v, v], dim=2)
        visible = torch.cat([visible_in_window(order, *window[3:]), visible], dim=2)
        if unit_bias is not None:
            unit_bias = torch.cat([unit_bias.new_zeros(order.shape[1]), unit_bias])
    return masked_attention(q, k, v, visible, scale, unit_bias)
