"""Small hierarchical models with shaken weights, shared by the tests."""

from __future__ import annotations

from typing import Any

import torch

from photon_train.models import HierarchicalConfig, HierarchicalForCausalLM

VOCABULARY = 61


def base_config(model_type: str = "llama", **changes: Any) -> dict[str, Any]:
    """A dense family's configuration, tiny, with grouped-query heads."""
    settings = {
        "model_type": model_type,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
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


def _levels(*chunks: int, slots: tuple[int, ...], windows: tuple[int | None, ...] | None = None, layers: int = 2):
    windows = windows or (*(3,) * (len(chunks) - 1), None)
    return [
        {
            "chunk_size": chunk,
            "num_slots": num_slots,
            "encoder_layers": 1,
            "encoder_window": window,
            "decoder_layers": layers,
        }
        for chunk, num_slots, window in zip(chunks, slots, windows, strict=True)
    ]


# One entry per path through the model; every equivalence test runs on all of them.
HIERARCHIES: dict[str, dict[str, Any]] = {
    "block-1": {"levels": _levels(3, slots=(2,))},
    "block-1-window": {"levels": _levels(4, slots=(3,), windows=(2,))},
    "block-2": {"levels": _levels(3, 2, slots=(2, 2))},
    "block-2-one-slot": {"levels": _levels(2, 3, slots=(1, 1), windows=(None, None))},
    "block-2-thin": {"levels": _levels(2, 1, slots=(3, 1), windows=(1, 2))},
    "block-3": {"levels": _levels(2, 2, 2, slots=(2, 1, 3))},
    "stream-1": {"layout": "stream", "levels": _levels(3, slots=(2,)), "window": 5, "num_sinks": 2},
    "stream-1-long": {"layout": "stream", "levels": _levels(4, slots=(1,)), "window": 11, "num_sinks": 5},
    "stream-2": {"layout": "stream", "levels": _levels(2, 2, slots=(1, 1)), "window": 6},
    "stream-2-slots": {"layout": "stream", "levels": _levels(3, 2, slots=(2, 2)), "window": 7, "num_sinks": 1},
    "stream-3": {"layout": "stream", "levels": _levels(2, 2, 2, slots=(3, 1, 2)), "window": 9, "num_sinks": 4},
}


def hierarchical_config(name: str, model_type: str = "llama", **changes: Any) -> HierarchicalConfig:
    """The configuration `name` of `HIERARCHIES` on a tiny dense family."""
    return HierarchicalConfig(**{"base_config": base_config(model_type), **HIERARCHIES[name], **changes})


def shake(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Give every parameter a value that no initialiser would, so that no path hides behind a 0 or a 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            # Vectors (norms, scales, biases) vary around a value that is neither 0 nor 1.
            parameter.copy_(0.7 + 0.3 * noise if parameter.dim() <= 1 else noise * parameter.shape[-1] ** -0.5)
    return model


def hierarchical_model(name: str, model_type: str = "llama", seed: int = 0, **changes: Any) -> HierarchicalForCausalLM:
    """A shaken model in evaluation mode, fp32."""
    return shake(HierarchicalForCausalLM(hierarchical_config(name, model_type, **changes)), seed).eval()


def tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    """Random token ids ``[batch, length]`` without the special ones."""
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))
