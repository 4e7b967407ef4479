"""The dense families that a PHOTON model can be: transformers' own classes, and how they rotate heads."""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

# model_type -> prefix of the class names in transformers.models.<model_type>
CLASS_PREFIXES = {
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "cohere2": "Cohere2",
    "exaone4": "Exaone4",
    "gemma2": "Gemma2",
    "gemma3_text": "Gemma3",
    "glm4": "Glm4",
    "granite": "Granite",
    "ministral3": "Ministral3",
    "olmo2": "Olmo2",
    "olmo3": "Olmo3",
    "seed_oss": "SeedOss",
    "smollm3": "SmolLM3",
    "gpt_oss": "GptOss",
    "granitemoe": "GraniteMoe",
    "mixtral": "Mixtral",
    "olmoe": "Olmoe",
    "qwen3_moe": "Qwen3Moe",
    "lfm2": "Lfm2",
    "qwen3_5_text": "Qwen3_5",
}
# What `layer_types` calls layers that have a state of constant size in place of attention.
RECURRENT = ("conv", "linear_attention")
# Families whose layers are Llama's but for biases and norms of heads: what takes layers apart knows no others.
LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3")
# Families that rotate neighbouring dimensions (2i, 2i + 1) together; the others rotate i and i + D / 2.
_INTERLEAVED = ("cohere2", "glm4")


@dataclass(frozen=True)
class Family:
    """Classes of a dense family.

    Attributes:
        model_type: Its ``model_type``.
        config: Configuration class.
        base_model, causal_lm: The decoder stack, and the decoder stack with its head.
        layer, norm: Decoder layer and normalisation.
        rotary: Rotary embedding, built as ``rotary(config=...)``.
    """

    model_type: str
    config: type[PretrainedConfig]
    base_model: type[PreTrainedModel]
    causal_lm: type[PreTrainedModel]
    layer: type[nn.Module]
    norm: type[nn.Module]
    rotary: type[nn.Module]


def check_family(model_type: str | None) -> str:
    """`model_type`, if it is supported.

    Raises:
        ValueError: for any other; the message lists those that are.
    """
    if model_type not in CLASS_PREFIXES:
        raise ValueError(
            f"model family {model_type!r} is not supported; supported families: {', '.join(sorted(CLASS_PREFIXES))}"
        )
    return model_type


def _names(model_type: str) -> tuple[str, str, str]:
    """Folder of a family in transformers, and the prefix of its classes' names: of text alone, and of all."""
    prefix = CLASS_PREFIXES[check_family(model_type)]
    folder = model_type.removesuffix("_text")
    return folder, prefix if folder == model_type else f"{prefix}Text", prefix


def config_class(model_type: str) -> type[PretrainedConfig]:
    """Configuration class of a family; loads no model code.

    Raises:
        ValueError: as `check_family`.
    """
    folder, text, _ = _names(model_type)
    return getattr(importlib.import_module(f"transformers.models.{folder}.configuration_{folder}"), f"{text}Config")


@functools.cache
def family(model_type: str) -> Family:
    """The classes of a family.

    Raises:
        ValueError: as `check_family`.
    """
    folder, text, prefix = _names(model_type)
    module = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    return Family(
        model_type=model_type,
        config=config_class(model_type),
        base_model=getattr(module, f"{text}Model"),
        causal_lm=getattr(module, f"{prefix}ForCausalLM"),
        layer=getattr(module, f"{prefix}DecoderLayer"),
        norm=getattr(module, f"{prefix}RMSNorm", None) or getattr(module, f"{prefix}LayerNorm"),
        rotary=getattr(module, f"{prefix}RotaryEmbedding", None) or getattr(module, f"{text}RotaryEmbedding"),
    )


# --- rotation ---


def has_rotation(config: Any, layer: int) -> bool:
    """Whether the family rotates queries and keys of `layer`: some know no position in their global layers."""
    family_name, kinds = config.base_model_type, getattr(config, "layer_types", None)
    if family_name == "smollm3":
        return bool(config.no_rope_layers[layer])
    if family_name == "cohere2":
        return kinds[layer] == "sliding_attention"
    if family_name == "exaone4":
        return config.sliding_window is None or kinds[layer] == "sliding_attention"
    return True


def rotation_kind(config: Any, layer: int) -> str | None:
    """The kind of layer that a rotary embedding asks for, where kinds of layers have rotations of their own."""
    return config.layer_types[layer] if config.base_model_type in ("gemma3_text", "olmo3") else None


def is_interleaved(config: Any) -> bool:
    """Whether neighbouring dimensions (2i, 2i + 1) are rotated together, not i and i + D / 2."""
    return config.base_model_type in _INTERLEAVED


def has_sink_logits(config: Any) -> bool:
    """Whether every softmax has a learned logit per head in its denominator, beside the keys."""
    return config.base_model_type == "gpt_oss"


def softcap(config: Any) -> float | None:
    """The bound c of attention scores, which become ``c * tanh(score / c)``; None: they have none."""
    # Gemma 3's configuration has the key too, but its attention does not read it.
    return config.attn_logit_softcapping if config.base_model_type == "gemma2" else None
