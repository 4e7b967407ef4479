"""A step of the vLLM plugin without vLLM, on hand-made blocks: by kernels and in torch, against the model itself."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from tiny import photon_model

from photon_train.models.memory_photon import LayerMemory
from photon_train.models.rows_photon import align_rows
from photon_vllm.steps import Layout, Step, StepMetadata

BLOCK, LENGTHS = 4, (31, 9, 1, 22)
NAMES = ["window", "memory", "memory-no-sinks", "memory-many-sinks", "memory-apart", "memory-8-bits", "memory-4-bits"]
NAMES += ["memory-full", "memory-unpacked"]


class Memory(LayerMemory):
    """Of the only rank."""

    def take_cells(self, states: torch.Tensor) -> torch.Tensor:
        return states[:, list(self.cells)]


def layers_of(model) -> Layout:
    """Attention modules and caches, as the plugin makes them; NaN where nothing was written."""
    config, layout = model.config, Layout(model.config, model.model.rotation)
    for layer in range(config.num_hidden_layers):
        # Other caches' blocks lie between this one's, in no whole number of tokens.
        block = (config.num_key_value_heads, BLOCK, 2 * config.head_dim)
        keys_and_values = torch.full((60, math.prod(block) + 20), torch.nan)[:, 4:-16].unflatten(1, block)
        memory = None
        if layer in config.memory_cells:
            memory = model.model.layers[layer].self_attn.memory
            memory.__class__ = Memory
            heads, bits = len(memory.cells), config.memory_bits
            units = 60, heads, max(1, 2 * BLOCK // config.chunk_size)
            cache = torch.full((*units, 2 * config.head_dim), torch.nan)
            if bits < 16:
                cache = torch.full((*units, 2 * config.head_dim * bits // 8 + 4), 255, dtype=torch.uint8)
            layout.units[layer] = SimpleNamespace(layer_name=f"{layer}.units", kv_cache=cache)
        layout.layers[layer] = SimpleNamespace(
            layer_name=str(layer),
            layer_idx=layer,
            kv_cache=keys_and_values,
            scale=0.4,
            softcap=None,
            memory=memory,
            sink_logits=torch.linspace(-1, 2, config.num_attention_heads) if layer % 2 else None,
        )
    return layout


def metadata_of(layout: Layout, past: list[int], new: list[int], order: list[int]) -> dict[str, StepMetadata]:
    """Blocks by request, in another order for latents; block 0 is nobody's."""
    blocks = 1 + torch.randperm(59, generator=torch.Generator().manual_seed(0))[:56].view(4, 14).int()
    past, new, found = torch.tensor(past)[order], torch.tensor(new)[order], {}
    for cache in (*layout.layers.values(), *layout.units.values()):
        table = blocks[order].flip(1) if cache.layer_name.endswith("units") else blocks[order]
        slots = []
        for row, (had, count) in enumerate(zip(past.tolist(), new.tolist(), strict=True)):
            positions = torch.arange(had, had + count)
            slots.append(table[row, positions // BLOCK] * BLOCK + positions % BLOCK)
        starts = torch.cat([torch.zeros(1, dtype=torch.long), new.cumsum(0)])
        found[cache.layer_name] = StepMetadata(starts, past + new, table, torch.cat(slots))
    return found


def expected(model, layout: Layout, layer: int, states: list[list[torch.Tensor]]) -> torch.Tensor:
    """What the model's own segment gives the last token of each request, read in one pass without a cache."""
    out = []
    for query, key, value in states:
        count = query.shape[2]
        embeds = torch.empty(1, count, model.config.hidden_size)
        segment = model.model._segments(align_rows(None, None, embeds, None), None, False)[layer]
        module = layout.layers[layer]
        out.append(segment.attend(module, query, key, value, module.scale, None, module.sink_logits)[:, :, -1])
    return torch.cat(out)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_decoding_step_equals_one_pass_over_each_text(name: str, backend: str) -> None:
    model = photon_model(name)
    config, layout = model.config, layers_of(model)
    generator = torch.Generator().manual_seed(2)
    heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
    states = [
        [torch.randn(1, count, length + 1, config.head_dim, generator=generator) for count in heads]
        for length in LENGTHS
    ]
    # Prompts come in two pieces, which cut windows and units; then one token each.
    ends = [[0] * 4, [length - length // 3 for length in LENGTHS], list(LENGTHS), [length + 1 for length in LENGTHS]]
    pieces = []
    for past, stop in zip(ends, ends[1:], strict=False):
        new = [end - had for had, end in zip(past, stop, strict=True)]
        # Requests with one token come first, others have some.
        order = sorted((row for row in range(4) if new[row]), key=lambda row: new[row] != 1)
        metadata = metadata_of(layout, past, new, order)
        pieces.append((Step(layout, metadata, backend), [(row, slice(past[row], stop[row])) for row in order]))
    for layer, module in layout.layers.items():
        for step, rows_of_step in pieces:
            rows = zip(*[[each[:, :, where] for each in states[row]] for row, where in rows_of_step], strict=True)
            query, key, value = (torch.cat([each[0].transpose(0, 1) for each in column]) for column in rows)
            out = torch.full_like(query, torch.nan)
            step.attend(module, query, key, value, out)
            assert not out.isnan().any(), "what nobody wrote was read"
        wanted = expected(model, layout, layer, states)
        tolerance = 2e-5 if config.memory_bits == 16 else 2e-3
        torch.testing.assert_close(out, wanted, atol=tolerance, rtol=tolerance)
