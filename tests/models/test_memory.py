"""The memory of one layer by itself, against its formula in float64."""

from __future__ import annotations

import pytest
import torch
from tiny import photon_model, shake

from photon_train.models.memory_photon import LayerMemory


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("name", ["memory", "memory-apart", "memory-unpacked"])
@torch.no_grad()
def test_folded_attention_over_several_pieces(name, bits, monkeypatch):
    """Rows of very different lengths: of one, a piece is hidden as a whole, of another everything is."""
    monkeypatch.setattr("photon_train.models.quantize_photon.PIECE", 1)
    config = photon_model(name).config
    config.memory_bits = bits
    memory = LayerMemory(config, min(config.memory_cells))
    shake(memory)
    generator = torch.Generator().manual_seed(0)
    units, heads, size = 150, len(memory.cells), memory.chunk_size
    keys, values = (torch.randn(3, heads, units * size, memory.head_dim, generator=generator) for _ in range(2))
    latents, stored = memory.pack(keys, values)
    content = torch.randn(3, len(memory.query_heads), memory.head_dim, generator=generator)
    token = torch.arange(units * size)
    visible = torch.stack([(token >= 3) & (token < 100 * size), token < 7 * size, token < 0])
    out, lse = memory.attend_folded(content, stored, visible, 0.3)

    memory.double()
    far_keys, far_values = memory.unpack(*(half.double() for half in latents))
    groups = len(memory.query_heads) // heads
    far_keys, far_values = (states.repeat_interleave(groups, dim=1) for states in (far_keys, far_values))
    scores = torch.einsum("nhd,nhed->nhe", content.double(), far_keys) * 0.3
    scores = scores.masked_fill(~visible[:, None], -torch.inf)
    expected = torch.einsum("nhe,nhed->nhd", scores.softmax(-1).nan_to_num(0.0), far_values)
    torch.testing.assert_close(out[:, :, 0].double(), expected, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(lse[..., 0].double(), scores.exp().sum(-1).log(), atol=2e-4, rtol=1e-4)
