"""The dense families that a PHOTON model can be: transformers' own classes, by name."""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

# model_type -> prefix of the class names in transformers.models.<model_type>
CLASS_PREFIXES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}


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


def config_class(model_type: str) -> type[PretrainedConfig]:
    """Configuration class of a family; loads no model code.

    Raises:
        ValueError: as `check_family`.
    """
    module = importlib.import_module(f"transformers.models.{check_family(model_type)}.configuration_{model_type}")
    return getattr(module, f"{CLASS_PREFIXES[model_type]}Config")


@functools.cache
def family(model_type: str) -> Family:
    """The classes of a family.

    Raises:
        ValueError: as `check_family`.
    """
    config = config_class(model_type)
    module = importlib.import_module(f"transformers.models.{model_type}.modeling_{model_type}")
    prefix = CLASS_PREFIXES[model_type]
    return Family(
        model_type=model_type,
        config=config,
        base_model=getattr(module, f"{prefix}Model"),
        causal_lm=getattr(module, f"{prefix}ForCausalLM"),
        layer=getattr(module, f"{prefix}DecoderLayer"),
        norm=getattr(module, f"{prefix}RMSNorm"),
        rotary=getattr(module, f"{prefix}RotaryEmbedding"),
    )
