"""Torch reference of the chunker on gathered rows."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def gather_chunk_project_naive(states: Tensor, rows: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """``[n, d_out]``; arguments as in ``gather_chunk_project``."""
    projected = F.linear(states[rows].flatten(1), weight)
    accumulate = torch.promote_types(projected.dtype, torch.float32)
    return (projected.to(accumulate) * scale.reshape(()).to(accumulate)).to(states.dtype)
