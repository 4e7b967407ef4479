"""Tiny dense checkpoints on disk, shared by the tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tiny import shake
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

FAMILY_NAMES = ("llama", "mistral", "qwen2", "qwen3", "phi3")


def dense_config(model_type: str = "llama", **changes: Any) -> PretrainedConfig:
    """A dense configuration with grouped-query heads and four layers."""
    settings = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": 64,
        "max_position_embeddings": 256,
    }
    if model_type == "phi3":  # whose default ids lie beyond a tiny vocabulary
        settings |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return AutoConfig.for_model(model_type, **{**settings, **changes})


def save_dense(directory: Path, model_type: str = "llama", max_shard_size: str = "5GB", **changes: Any) -> Path:
    """Write a shaken dense model in transformers' format."""
    model = shake(AutoModelForCausalLM.from_config(dense_config(model_type, **changes)))
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    return directory
