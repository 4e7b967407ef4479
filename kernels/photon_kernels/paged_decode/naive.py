"""Torch reference of the decode attention over a growing store."""

from __future__ import annotations

import torch
from torch import Tensor

from photon_kernels._reference import masked_attention, read_rows


def paged_decode_attention_naive(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Tensor,
    scale: float,
    rows: Tensor | None = None,
    block_table: Tensor | None = None,
    start: Tensor | None = None,
    num_sinks: int = 0,
) -> tuple[Tensor, Tensor]:
    """Output ``[B, Hq, Q, D]`` and log-sum-exps ``[B, Hq, Q]``; arguments as in ``paged_decode_attention``."""
    k, v = (read_rows(states, rows, block_table, seen.amax(dim=1)) for states in (k, v))
    element = torch.arange(k.shape[2], device=k.device)
    visible = element < seen[:, :, None]
    if start is not None:
        visible = visible & ((element >= start[:, :, None]) | (element < num_sinks))
    return masked_attention(q, k, v, visible, scale)
