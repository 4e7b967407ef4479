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


def level(chunk_size: int, **settings: Any) -> dict[str, Any]:
    return {"chunk_size": chunk_size, **settings}


def _block(*chunks: int, slots: int = 2) -> dict[str, Any]:
    levels = [
        level(
            c, num_slots=slots, encoder_layers=1, encoder_window=None if i + 1 == len(chunks) else 3, decoder_layers=2
        )
        for i, c in enumerate(chunks)
    ]
    return {"layout": "block", "conditioning": "slots", "levels": levels}


def _stream(conditioning: str, *chunks: int, window: int, **settings: Any) -> dict[str, Any]:
    levels = [
        level(
            c, encoder_layers=1, encoder_window=None if i + 1 == len(chunks) else 3, decoder_layers=3 if i == 0 else 0
        )
        for i, c in enumerate(chunks)
    ]
    for index, override in enumerate(settings.pop("levels", [])):
        levels[index].update(override)
    return {"layout": "stream", "conditioning": conditioning, "levels": levels, "window": window, **settings}


# One entry per path through the model; every equivalence test runs on all of them.
HIERARCHIES: dict[str, dict[str, Any]] = {
    "block-1": _block(3),
    "block-2": _block(3, 2),
    "block-2-one-slot": _block(2, 3, slots=1),
    "block-3": _block(2, 2, 2),
    "memory-1": _stream("memory", 4, window=6, memory_layers=[0, 2]),
    "memory-2-sinks": _stream("memory", 2, 3, window=7, num_sinks=3, memory_layers=[1]),
    "memory-two-levels": _stream(
        "memory", 2, 2, window=5, num_sinks=1, memory_layers=[0, 2], memory_levels=[1, 2], memory_pooling="linear"
    ),
    "memory-latent": _stream("memory", 3, window=5, num_sinks=2, memory_layers=[0, 2], memory_pooling="latent"),
    "memory-latent-apart": _stream(
        "memory", 2, window=5, num_sinks=2, memory_layers=[0, 2], memory_pooling="latent", memory_latent_parts=2
    ),
    "memory-latent-shared": _stream(
        "memory",
        *(2, 2),
        window=5,
        num_sinks=1,
        memory_layers=[0, 1, 2],
        memory_levels=[1, 2, 2],
        memory_sources=[0, 1, 1],
        memory_pooling="latent",
    ),
    "memory-3-full": _stream("memory", 2, 2, 2, window=9, memory_layers=[2], full_attention_layers=[1]),
    "memory-branch": _stream("memory", 3, window=4, branch_layer=1, memory_layers=[1, 2], unit_positions="scaled"),
    "residual-1-change": _stream("residual", 3, window=5, branch_layer=1, summary="change"),
    "residual-2": _stream("residual", 2, 3, window=6, num_sinks=2, levels=[{"num_slots": 2}, {"num_slots": 3}]),
    "residual-2-decoder": _stream("residual", 2, 2, window=4, levels=[{}, {"decoder_layers": 1, "num_slots": 2}]),
    "slots-1": _stream("slots", 3, window=5, num_sinks=2, levels=[{"num_slots": 2}]),
    "slots-2-decoder": _stream("slots", 2, 2, window=6, levels=[{}, {"decoder_layers": 1}]),
    "slots-3": _stream("slots", 2, 2, 2, window=8, full_attention_layers=[0], levels=[{"num_slots": 3}]),
}


def photon_config(name: str, model_type: str = "llama", **changes: Any) -> PhotonConfig:
    """The configuration `name` of `HIERARCHIES` on a tiny dense family."""
    return PhotonConfig(base_config=base_config(model_type), **{**HIERARCHIES[name], **changes})


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
