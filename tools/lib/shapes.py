"""Models of known shapes, for predictions and for benchmarks with random weights."""

from __future__ import annotations

from transformers import LlamaConfig, PretrainedConfig

from photon_train.config import RunConfig
from photon_train.conversion.presets import photon_config
from photon_train.errors import PhotonError

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


SYSTEMS = ("graft", "graft-apart", "split", "paper")


def dense_shape(name: str) -> LlamaConfig:
    """Configuration of a dense model, with PyTorch's attention."""
    return LlamaConfig(**SHAPES[name], attn_implementation="sdpa")


def photon_shape(dense: LlamaConfig, system: str, window: int) -> PretrainedConfig:
    """Configuration of what a preset makes of a dense model.

    Args:
        system: One of `SYSTEMS`: a preset; ``graft-apart`` packs keys and values of a unit apart.
        window: Tokens that the token stream looks back on.

    Raises:
        PhotonError: for an unknown system, naming it.
    """
    if system not in SYSTEMS:
        raise PhotonError(f"system {system!r} is not one of {', '.join(SYSTEMS)}")
    settings = RunConfig(preset=system.removesuffix("-apart"))
    if system == "graft-apart":
        settings.photon.latents_per_unit = 2
    settings.photon.window = None if system == "paper" else window
    return photon_config(dense, settings)
