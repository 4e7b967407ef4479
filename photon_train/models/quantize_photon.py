"""Numbers in 8 or 4 bits with a scale per vector, as the cache stores latents."""

from __future__ import annotations

from functools import cached_property

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


def levels(codes: torch.Tensor, bits: int, dtype: torch.dtype) -> torch.Tensor:
    """What codes stand for in units of their scale, ``[..., D]``: exact in every floating-point type."""
    if bits == 4:
        codes = torch.cat([codes & 15, codes >> 4], dim=-1)
    return codes.to(dtype).sub_(2 ** (bits - 1) - 0.5)


def dequantize(codes: torch.Tensor, scales: torch.Tensor, bits: int, dtype: torch.dtype) -> torch.Tensor:
    """The numbers that codes stand for, ``[..., D]``; see `quantize`."""
    return levels(codes, bits, torch.float32).mul_(scales.float()).to(dtype)


# Numbers of a stored operand that are made at a time: they stay in a processor's cache until they are used.
PIECE = 2**20


class StoredVectors:
    """Vectors of some heads as the cache stores them, an operand of products that are taken without their scales.

    Levels of codes are exact in every type, and a product is scaled afterwards.

    Args:
        states: Codes or, of 16 bits, the vectors, ``[n, m, U, size]``.
        scales: ``[n, m, U, 1]``; None: of 16 bits.
        bits: Of a number.
        dtype: Of the products' other operand.
    """

    def __init__(self, states: torch.Tensor, scales: torch.Tensor | None, bits: int, dtype: torch.dtype) -> None:
        self.states, self.scales, self.bits, self.dtype = states, scales, bits, dtype

    def pieces(self) -> list[StoredVectors]:
        """Their vectors in order, few enough at a time that `PIECE` numbers of a head are made."""
        rows, _, count, size = self.states.shape
        if self.bits == 16 or not count:
            return [self]
        step = max(PIECE // (rows * size * 8 // self.bits), 64)
        parts = (self.states.split(step, dim=2), self.scales.split(step, dim=2))
        return [StoredVectors(*part, self.bits, self.dtype) for part in zip(*parts, strict=True)]

    @cached_property
    def _numbers(self) -> list[torch.Tensor]:
        """By head, ``[n, U, D]``: the vectors, or the levels of their codes."""
        heads = self.states.unbind(1)
        return list(heads) if self.bits == 16 else [levels(codes, self.bits, self.dtype) for codes in heads]

    def _scaled(self, products: torch.Tensor, head: int) -> torch.Tensor:
        return products if self.scales is None else products * self.scales[:, head, None, :, 0].float()

    def dot(self, queries: torch.Tensor) -> torch.Tensor:
        """Products of ``queries [n, Q, m * D]`` with all heads' vectors, ``[n, Q, U]`` (fp32)."""
        heads = enumerate(zip(queries.chunk(len(self._numbers), dim=-1), self._numbers, strict=True))
        return sum(self._scaled((query @ states.transpose(1, 2)).float(), head) for head, (query, states) in heads)

    def mix(self, weights: torch.Tensor) -> torch.Tensor:
        """Sums of all heads' vectors under ``weights [n, Q, U]`` (fp32), ``[n, Q, m * D]``."""
        heads = enumerate(self._numbers)
        return torch.cat([self._scaled(weights, head).to(self.dtype) @ states for head, states in heads], dim=-1)


class StraightThrough(torch.autograd.Function):
    """Values of `rounded`, gradients of `states` (arXiv 1308.3432)."""

    @staticmethod
    def forward(ctx, states: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
        return rounded

    @staticmethod
    def backward(ctx, upstream: torch.Tensor):
        return upstream, None
