"""Models of known shapes, for predictions and for benchmarks with random weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import LlamaConfig, PretrainedConfig

from photon_train.config import PhotonSettings, RunConfig
from photon_train.conversion.presets import photon_config

_LLAMA = {"vocab_size": 128256, "max_position_embeddings": 140_000, "rope_parameters": {"rope_type": "default"}}
_LLAMA["rope_parameters"] |= {"rope_theta": 500_000.0}
SHAPES = {
    # The demo's dense model.
    "demo": {
        "vocab_size": 4096,
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 16_384,
    },
    # SmolLM2-135M; its own longest position is 8,192, which random weights do not know.
    "smollm2": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 32_768,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100_000.0},
        "tie_word_embeddings": True,
    },
    # Llama-3.2-1B.
    "1b": _LLAMA
    | {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    # Llama-3.1-8B.
    "8b": _LLAMA
    | {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
}


def whole_layers(dense: PretrainedConfig) -> dict[str, Any]:
    """A memory of all heads in an eighth of the layers, evenly in the upper half and in the topmost: 3.1% of the dense
    model's growing KV, with a latent of 16-bit numbers per 4 tokens (8 in models of fewer than 8 layers).

    Returns:
        Settings of the `photon` group.
    """
    total = dense.num_hidden_layers
    number = max(1, total // 8)
    layers = range(total)[:: -max(1, total // (2 * number))][:number]
    cells = [f"{layer}:{head}" for layer in layers for head in range(dense.num_key_value_heads)]
    return {"memory_cells": cells, "memory_bits": 16, "chunk_size": 4 if total >= 8 else 8}


def _whole_layers_apart(dense: LlamaConfig) -> dict[str, Any]:
    return whole_layers(dense) | {"latents_per_unit": 2}


def _no_memory(dense: LlamaConfig) -> dict[str, Any]:
    return {"memory_cells": []}


def _all_full(dense: LlamaConfig) -> dict[str, Any]:
    return {"memory_cells": [], "full_attention_layers": list(range(dense.num_hidden_layers))}


def _defaults(dense: LlamaConfig) -> dict[str, Any]:
    return {}


# What is compared: the settings of the `photon` group by name, beside the window.
SYSTEMS: dict[str, tuple[str, Callable[[LlamaConfig], dict[str, Any]]]] = {
    "graft": ("graft", whole_layers),  # what predictions and measurements were made of so far
    "graft-apart": ("graft", _whole_layers_apart),  # keys and values packed apart
    "graft-cells": ("graft", _defaults),  # the default: single heads, in 4 bits
    "graft-window": ("graft", _no_memory),  # window and sinks alone
    "dense-engine": ("graft", _all_full),  # the dense model itself, on the engine's paged cache, kernels and graphs
    "split": ("split", _defaults),
    "paper": ("paper", _defaults),
}


def dense_shape(name: str, layers: int | None = None) -> LlamaConfig:
    """Configuration of a dense model, with PyTorch's attention; of `layers` layers in place of the shape's own."""
    own = {} if layers is None else {"num_hidden_layers": layers}
    return LlamaConfig(**SHAPES[name] | own, attn_implementation="sdpa")


def photon_shape(dense: LlamaConfig, system: str, window: int | None = None) -> PretrainedConfig:
    """Configuration of what a system of `SYSTEMS` makes of a dense model.

    Args:
        window: Tokens that the token stream looks back on (`paper` has none); None: the preset's own choice.
    """
    preset, settings = SYSTEMS[system]
    photon = PhotonSettings(window=None if preset == "paper" else window, **settings(dense))
    return photon_config(dense, RunConfig(preset=preset, photon=photon))
