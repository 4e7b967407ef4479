"""Numbers in 8 or 4 bits with a scale per vector, as the cache stores latents."""

from __future__ import annotations

import torch

SCALE_TYPE = torch.bfloat16  # the range of fp32; codes are made with the rounded scale


def quantize(states: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Round each vector to ``2 ** bits`` equidistant levels, symmetric about 0 (which is no level).

    Code c stands for ``(c - (2 ** bits - 1) / 2) * scale``. Of 4 bits, byte i holds the codes of numbers i (low half)
    and D / 2 + i.

    Args:
        states: ``[..., D]``; of even D for 4 bits.

    Returns:
        Codes ``[..., D * bits / 8]`` (uint8) and scales ``[..., 1]`` (bf16).
    """
    half = 2 ** (bits - 1)
    states = states.float()
    # A vector of zeros keeps its codes finite.
    scales = (states.abs().amax(-1, keepdim=True) / half).clamp(min=1e-30).to(SCALE_TYPE)
    codes = ((states / scales.float()).floor() + half).clamp(0, 2 * half - 1).to(torch.uint8)
    if bits == 4:
        low, high = codes.chunk(2, dim=-1)
        codes = low | (high << 4)
    return codes, scales


def dequantize(codes: torch.Tensor, scales: torch.Tensor, bits: int, dtype: torch.dtype) -> torch.Tensor:
    """The numbers that codes stand for, ``[..., D]``; see `quantize`."""
    if bits == 4:
        codes = torch.cat([codes & 15, codes >> 4], dim=-1)
    scales = scales.float()
    # Exact in fp32, and fewer passes over the numbers than code by code.
    return torch.addcmul(scales * (0.5 - 2 ** (bits - 1)), codes.float(), scales).to(dtype)


class StraightThrough(torch.autograd.Function):
    """Values of `rounded`, gradients of `states` (arXiv 1308.3432)."""

    @staticmethod
    def forward(ctx, states: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
        return rounded

    @staticmethod
    def backward(ctx, upstream: torch.Tensor):
        return upstream, None
