"""The dense families whose decoder layers PHOTON stacks are made of: transformers' own classes, by name."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

# model_type -> prefix of the class names in transformers.models.<model_type>.modeling_<model_type>
CLASS_PREFIXES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}


@dataclass(frozen=True)
class FamilyClasses:
    """What a PHOTON model takes from a dense family.

    Attributes:
        layer: Decoder layer class, built as ``layer(base_config, layer_idx)``.
        norm: Normalisation class, built as ``norm(hidden_size, eps=...)``.
        rotary: Rotary embedding class, built as ``rotary(config=base_config)``.
        apply_rotary: ``(q, k, cos, sin) -> (q, k)``.
    """

    layer: type[nn.Module]
    norm: type[nn.Module]
    rotary: type[nn.Module]
    apply_rotary: Callable


def family_classes(model_type: str) -> FamilyClasses:
    """The classes of `model_type`.

    Raises:
        ValueError: for a family that is not supported; the message lists those that are.
    """
    if model_type not in CLASS_PREFIXES:
        raise ValueError(
            f"model family {model_type!r} is not supported; supported families: {', '.join(sorted(CLASS_PREFIXES))}"
        )
    module = importlib.import_module(f"transformers.models.{model_type}.modeling_{model_type}")
    prefix = CLASS_PREFIXES[model_type]
    return FamilyClasses(
        layer=getattr(module, f"{prefix}DecoderLayer"),
        norm=getattr(module, f"{prefix}RMSNorm"),
        rotary=getattr(module, f"{prefix}RotaryEmbedding"),
        apply_rotary=module.apply_rotary_pos_emb,
    )
