"""Tiny dense checkpoints on disk, shared by the tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tiny import shake
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from photon_train.conversion.families import FAMILIES

FAMILY_NAMES = tuple(FAMILIES)

# Of four layers, what makes a family's specials count in a text of tens of tokens.
_LOCAL = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
_LOCAL_LAYERS = {"sliding_window": 12, "layer_types": _LOCAL}


def _hybrid(recurrent: str) -> dict[str, Any]:
    return {"layer_types": [recurrent, "full_attention", recurrent, "full_attention"]}


SPECIALS: dict[str, dict[str, Any]] = {
    "granite": {
        "attention_multiplier": 0.2,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.6,
        "logits_scaling": 2.5,
    },
    "smollm3": {"no_rope_layers": [1, 0, 1, 0]},
    "seed_oss": {"attention_dropout": 0.0},
    "gemma2": {
        **_LOCAL_LAYERS,
        "query_pre_attn_scalar": 5,
        "attn_logit_softcapping": 1.5,
        "final_logit_softcapping": 2.0,
    },
    "gemma3_text": {
        **_LOCAL_LAYERS,
        "query_pre_attn_scalar": 5,
        "final_logit_softcapping": 3.0,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e3},
            "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
        },
    },
    "olmo3": {
        **_LOCAL_LAYERS,
        "rope_parameters": {
            "full_attention": {
                "rope_type": "yarn",
                "factor": 4.0,
                "rope_theta": 1e4,
                "original_max_position_embeddings": 16,
            },
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    },
    "cohere2": {**_LOCAL_LAYERS, "logit_scale": 0.4},
    "exaone4": _LOCAL_LAYERS,
    "gpt_oss": {
        **_LOCAL_LAYERS,
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 4.0,
            "rope_theta": 1e4,
            "truncate": False,
            "original_max_position_embeddings": 16,
        },
    },
    "granitemoe": {
        "attention_multiplier": 0.2,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.6,
        "logits_scaling": 2.5,
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
    },
    "mixtral": {"num_local_experts": 5, "num_experts_per_tok": 2},
    "olmoe": {"num_experts": 5, "num_experts_per_tok": 2, "clip_qkv": 1.0},
    "qwen3_moe": {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True},
    "lfm2": {**_hybrid("conv"), "block_multiple_of": 16},
    "qwen3_5_text": {
        **_hybrid("linear_attention"),
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 6,
        "linear_value_head_dim": 5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    },
    "ministral3": {
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 4.0,
            "rope_theta": 1e4,
            "original_max_position_embeddings": 16,
            "llama_4_scaling_beta": 0.3,
        }
    },
}
_SMALL_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


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
    if model_type not in ("llama", "mistral", "qwen2", "qwen3"):  # whose default ids lie in a tiny vocabulary
        settings |= _SMALL_IDS
    if model_type in SPECIALS:
        settings |= {**SPECIALS[model_type]}
    return AutoConfig.for_model(model_type, **{**settings, **changes})


def save_dense(directory: Path, model_type: str = "llama", max_shard_size: str = "5GB", **changes: Any) -> Path:
    """Write a shaken dense model in transformers' format."""
    model = shake(AutoModelForCausalLM.from_config(dense_config(model_type, **changes)))
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    return directory
