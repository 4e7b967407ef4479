"""Sizes of the engine, and what they make of the memory there is."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from transformers import PreTrainedModel

from photon_train.errors import PhotonError
from photon_train.files import parse_size
from photon_train.inference.cache import CacheLayout
from photon_train.inference.defaults import check_mode
from photon_train.models.attention_photon import load_kernels

GPU_SHARE = 0.9  # of the free memory; the rest is for activations


def free_memory(device: torch.device) -> int | None:
    """Free bytes of a GPU; None for any other device."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


def decode_bytes(model: PreTrainedModel, rows: int, tokens: int) -> int:
    """Bytes that grow with the text and that decoding takes beside the cache: the kernels' weights of latents.

    Args:
        rows: Sequences that decode at a time; tokens: those of the longest, in whole blocks.
    """
    config = model.config
    if model.backend != "triton" or not getattr(config, "memory_cells", None):
        return 0
    groups = config.num_attention_heads // config.num_key_value_heads
    heads = groups * max(map(len, config.memory_cells.values()))  # one layer decodes at a time
    element_size = model.get_input_embeddings().weight.element_size()
    units = tokens // config.chunk_size
    return load_kernels().latent_decode_bytes(rows, heads, config.chunk_size, units, config.head_dim, element_size)


@dataclass(frozen=True)
class EngineSettings:
    """Sizes of the engine.

    Attributes:
        memory: Bytes of the cache, as a number or a size (``4GiB``). None: 90% of a GPU's free memory, less what
            decoding takes beside the cache (`decode_bytes`); on a CPU what `max_sequences` sequences of `max_length`
            need.
        max_sequences: Sequences that run at a time.
        max_prefixes: Prefixes of prompts that are kept; 0 keeps none.
        max_length: Longest sequence that memory is planned for; None: the model's longest position.
        block_size: Tokens of a block; None: 256, rounded up to whole units.
        segment_tokens: Prompt tokens that a sequence is fed at once.
        step_tokens: Prompt tokens fed between two decoding steps, of all sequences together.
        cuda_graphs: Replay decoding steps as CUDA graphs: `auto` on a GPU, or `off`.
        generation_config: `auto` takes sampling settings of the model's generation config where none are given (see
            `defaults`), `ignore` takes none.
    """

    memory: int | str | None = None
    max_sequences: int = 64
    max_prefixes: int = 8
    max_length: int | None = None
    block_size: int | None = None
    segment_tokens: int = 1024
    step_tokens: int = 2048
    cuda_graphs: str = "auto"
    generation_config: str = "auto"

    def __post_init__(self) -> None:
        for name in ("max_sequences", "segment_tokens", "step_tokens"):
            if getattr(self, name) < 1:
                raise PhotonError(f"{name}={getattr(self, name)} must be at least 1")
        if self.max_prefixes < 0:
            raise PhotonError(f"max_prefixes={self.max_prefixes} must not be negative")
        if self.cuda_graphs not in ("auto", "off"):
            raise PhotonError(f"cuda_graphs={self.cuda_graphs!r} is not auto or off")
        check_mode(self.generation_config)


def plan_cache(model: PreTrainedModel, settings: EngineSettings) -> CacheLayout:
    """Sizes of the cache of an engine.

    Raises:
        PhotonError: if the memory is too small for the settings.
    """
    weights = model.get_input_embeddings().weight
    fit = partial(
        CacheLayout.fit,
        model,
        num_rows=settings.max_sequences + settings.max_prefixes,
        block_size=settings.block_size,
        max_length=settings.max_length,
    )
    if settings.memory is not None:
        return fit(parse_size(settings.memory, "memory"))
    most, free = fit(2**62), free_memory(weights.device)
    if free is None:
        return most
    longest = most.blocks_for(settings.max_length or model.config.max_position_embeddings) * most.block_size
    left = int(free * GPU_SHARE) - decode_bytes(model, settings.max_sequences, longest)
    if left < 0:
        raise PhotonError(
            f"the GPU's {free} free bytes hold no cache beside what decoding {settings.max_sequences} sequences of "
            f"{longest} tokens takes: lower max_sequences or max_length"
        )
    return fit(left)
