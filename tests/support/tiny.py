"""Small configurations and shaken weights, shared by the tests."""

from __future__ import annotations

from typing import Any

import torch

from photon_train.models import PhotonConfig, PhotonForCausalLM

VOCABULARY = 61


def base_config(model_type: str = "llama", **changes: Any) -> dict[str, Any]:
    """A dense family's configuration, tiny, with grouped-query heads."""
    settings = {
        "model_type": model_type,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 512,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }
    return {**settings, **changes}


# One entry per kind of layer and edge of it; every equivalence test runs on all of them.
GRAFTS: dict[str, dict[str, Any]] = {
    "window": {"window": 7, "num_sinks": 3, "memory_cells": {}},
    "window-one-token": {"window": 1, "num_sinks": 0, "memory_cells": {}},
    "memory": {"window": 5, "num_sinks": 2, "chunk_size": 3, "memory_cells": {0: [1], 2: [0, 1]}},
    "memory-no-sinks": {"window": 4, "num_sinks": 0, "chunk_size": 4, "memory_cells": {1: [0, 1]}},
    "memory-many-sinks": {"window": 6, "num_sinks": 9, "chunk_size": 2, "memory_cells": {0: [0], 1: [1], 2: [0, 1]}},
    "memory-apart": {
        "window": 5,
        "num_sinks": 2,
        "chunk_size": 2,
        "memory_cells": {0: [0, 1], 2: [1]},
        "latents_per_unit": 2,
    },
    "memory-unpacked": {"window": 6, "num_sinks": 1, "chunk_size": 1, "memory_cells": {1: [0]}},
    "memory-8-bits": {
        "window": 5,
        "num_sinks": 2,
        "chunk_size": 2,
        "memory_cells": {0: [0], 2: [0, 1]},
        "memory_bits": 8,
    },
    "memory-4-bits": {
        "window": 5,
        "num_sinks": 1,
        "chunk_size": 1,
        "memory_cells": {0: [0, 1], 1: [1]},
        "memory_bits": 4,
        "latents_per_unit": 2,
    },
    "memory-full": {
        "window": 9,
        "num_sinks": 4,
        "chunk_size": 4,
        "memory_cells": {2: [0]},
        "full_attention_layers": [1],
    },
}


def photon_config(name: str, model_type: str = "llama", **changes: Any) -> PhotonConfig:
    """The configuration `name` of `GRAFTS` on a tiny dense family."""
    settings = base_config(model_type)
    return PhotonConfig(base_model_type=settings.pop("model_type"), **{**settings, **GRAFTS[name], **changes})


def shake(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Give every parameter a value that no initialiser would, so that no path hides behind a 0 or a 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            # Vectors (norms, gates, biases) vary around a value that is neither 0 nor 1.
            parameter.copy_(0.7 + 0.3 * noise if parameter.dim() <= 1 else noise * parameter.shape[-1] ** -0.5)
    return model


def photon_model(name: str, model_type: str = "llama", seed: int = 0, **changes: Any) -> PhotonForCausalLM:
    """A shaken model in evaluation mode, fp32."""
    return shake(PhotonForCausalLM(photon_config(name, model_type, **changes)), seed).eval()


def tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    """Random token ids ``[batch, length]`` without the special ones."""
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))
