"""Torch reference of packing the unit that leaves the window."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def unit_pack_naive(
    keys: Tensor,
    values: Tensor,
    rows: Tensor,
    slots: Tensor,
    heads: Tensor,
    cosine: Tensor,
    sine: Tensor,
    weights: tuple[Tensor, Tensor],
    biases: tuple[Tensor, Tensor],
    targets: Sequence[Tensor],
    units: Tensor,
    block_table: Tensor | None = None,
    bits: int = 16,
    is_interleaved: bool = False,
) -> None:
    """Arguments as in ``unit_pack``."""
    keep = units >= 0
    rows, slots, units = rows[keep], slots[keep], units[keep]
    cosine, sine = (part if part.shape[0] == 1 else part[keep] for part in (cosine, sine))
    # [n, S, m, D]
    taken = [states[rows[:, None, None], heads, slots[:, :, None]] for states in (keys, values)]
    taken[0] = _unrotated(taken[0], cosine[:, :, None], sine[:, :, None], is_interleaved)
    joined = torch.stack(taken, dim=2)
    is_joint = weights[0].shape[1] == 2 * slots.shape[1] * len(heads) * keys.shape[3]
    where = rows, units
    if block_table is not None:
        per_block = targets[0].shape[2]
        where = block_table[rows, units // per_block], units % per_block
    for half, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        given = joined if is_joint else joined[:, :, half]
        precise = torch.promote_types(keys.dtype, torch.float32)
        latents = given.flatten(1).to(precise) @ weight.T.to(precise) + bias.to(precise)
        latents = latents.to(keys.dtype).unflatten(1, (len(heads), -1))
        if bits == 16:
            targets[half][where[0], :, where[1]] = latents.to(targets[half].dtype)
            continue
        codes, scales = _codes(latents, bits, targets[2].dtype)
        targets[half][where[0], :, where[1]] = codes
        targets[2 + half][where[0], :, where[1]] = scales


def _unrotated(states: Tensor, cosine: Tensor, sine: Tensor, is_interleaved: bool) -> Tensor:
    size = cosine.shape[-1]
    turned, rest = states[..., :size], states[..., size:]
    if is_interleaved:
        crossed = torch.stack([-turned[..., 1::2], turned[..., ::2]], dim=-1).flatten(-2)
    else:
        crossed = torch.cat([-turned[..., size // 2 :], turned[..., : size // 2]], dim=-1)
    return torch.cat([(turned * cosine - crossed * sine).to(states.dtype), rest], dim=-1)


def _codes(states: Tensor, bits: int, scale_type: torch.dtype) -> tuple[Tensor, Tensor]:
    half = 2 ** (bits - 1)
    states = states.float()
    scales = (states.abs().amax(-1, keepdim=True) / half).clamp(min=1e-30).to(scale_type)
    codes = ((states / scales.float()).floor() + half).clamp(0, 2 * half - 1).to(torch.uint8)
    if bits == 4:
        low, high = codes.chunk(2, dim=-1)
        codes = low | (high << 4)
    return codes, scales
