"""Torch reference of the decode attention over latents."""

from __future__ import annotations

import torch
from torch import Tensor

from photon_kernels._reference import read_rows


def latent_decode_naive(
    folded: Tensor,
    bias: Tensor,
    keys: Tensor,
    values: Tensor,
    visible: Tensor,
    scale: float,
    first_token: int = 0,
    rows: Tensor | None = None,
    block_table: Tensor | None = None,
    scales: tuple[Tensor, Tensor] | None = None,
    bits: int = 16,
) -> tuple[Tensor, Tensor, Tensor]:
    """The fields of a ``LatentMix``; arguments as in ``latent_decode``."""
    keys, values = (read_rows(half, rows, block_table, visible) for half in (keys, values))
    if scales is not None:
        factors = (read_rows(each, rows, block_table, visible) for each in scales)
        keys, values = (_decode(*half, bits, folded.dtype) for half in zip((keys, values), factors, strict=True))
    # [B, U, C]
    latents = torch.stack([keys, values], dim=1).flatten(1, 2).transpose(1, 2).flatten(2)
    units = latents.shape[1]
    seen = torch.arange(units, device=visible.device) < visible[:, None]
    latents = latents.masked_fill(~seen[:, :, None], 0.0)
    scored, summed = latents[..., : folded.shape[3]], latents[..., -folded.shape[3] :]
    chunk_size = folded.shape[2]
    inside = torch.arange(chunk_size, device=visible.device)[:, None]
    token = torch.arange(units, device=visible.device) * chunk_size + inside
    seen = (seen[:, None] & (token >= first_token))[:, None]
    precise = torch.promote_types(folded.dtype, torch.float32)
    logits = torch.einsum("bhsc,buc->bhsu", folded, scored).to(precise) + bias[..., None]
    logits = (logits * scale).masked_fill(~seen, -torch.inf)
    lse = logits.flatten(2).logsumexp(dim=-1)
    shift = lse.masked_fill(lse == -torch.inf, 0.0)
    weights = (logits - shift[:, :, None, None]).exp()
    mixed = torch.einsum("bhsu,buc->bhsc", weights.to(folded.dtype), summed)
    return mixed, weights.sum(-1), lse


def _decode(codes: Tensor, scales: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    if bits == 4:
        codes = torch.cat([codes & 15, codes >> 4], dim=-1)
    return ((codes.float() - (2**bits - 1) / 2) * scales.float()).to(dtype)
