"""The dense families that can be converted, and what differs between them, as data.

The families' layer classes live in `photon_train.models`; a new family needs an entry in both registries.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from photon_train.accounting.model import ATTENTION, MLP, Shape
from photon_train.errors import PhotonError


@dataclass(frozen=True)
class Family:
    """What the conversion has to know about one dense family.

    All families share Llama's module names (``model.layers.{i}.self_attn.q_proj.weight``, ...); the
    fields say what a decoder layer holds beyond Llama's weights.

    Attributes:
        model_type: The ``model_type`` of the family's ``config.json``.
        biases: Linear layers that always have a bias.
        biases_by_key: Linear layers that have a bias when the named key of the config is true.
        head_norms: Whether queries and keys are normalised per head (``q_norm``, ``k_norm``).
        sliding_window: Which layers look back on ``sliding_window`` tokens only: ``none``, ``all``
            (whenever the key is set) or ``layer_types`` (those that the key of that name marks).
    """

    model_type: str
    biases: tuple[str, ...] = ()
    biases_by_key: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: MappingProxyType({}))
    head_norms: bool = False
    sliding_window: str = "none"


FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family("llama", biases_by_key={"attention_bias": ATTENTION, "mlp_bias": MLP}),
        Family("mistral", sliding_window="all"),
        Family("qwen2", biases=("q_proj", "k_proj", "v_proj"), sliding_window="layer_types"),
        Family("qwen3", biases_by_key={"attention_bias": ATTENTION}, head_norms=True, sliding_window="layer_types"),
    )
}


def family_of(config: Any) -> Family:
    """The family of a dense model's configuration.

    Args:
        config: A `PretrainedConfig`, or the dict of a ``config.json``.

    Raises:
        PhotonError: if the family is not supported; the message lists those that are.
    """
    model_type = config.get("model_type") if isinstance(config, dict) else config.model_type
    if model_type not in FAMILIES:
        raise PhotonError(
            f"model_type {model_type!r} cannot be converted; supported families: {', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES[model_type]


def attention_span(config: Any) -> int | None:
    """Tokens that the narrowest layer of a dense model looks back on, or None at full attention."""
    rule = family_of(config).sliding_window
    if rule == "none" or (rule == "layer_types" and "sliding_attention" not in (config.layer_types or ())):
        return None
    return config.sliding_window


def dense_tensors(config: Any) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a checkpoint of this configuration must hold.

    The output head is not among them where it shares the embedding's weight.

    Args:
        config: The dense model's configuration object.

    Raises:
        PhotonError: if the family is not supported.
    """
    family = family_of(config)
    sizes = Shape.of(config)
    hidden = (sizes.hidden,)
    biased = set(family.biases)
    for key, names in family.biases_by_key.items():
        if getattr(config, key, False):
            biased.update(names)
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": hidden,
        "post_attention_layernorm.weight": hidden,
    }
    for name, shape in sizes.linears.items():
        block = "self_attn" if name in ATTENTION else "mlp"
        layer[f"{block}.{name}.weight"] = shape
        if name in biased:
            layer[f"{block}.{name}.bias"] = shape[:1]
    if family.head_norms:
        layer["self_attn.q_norm.weight"] = layer["self_attn.k_norm.weight"] = (sizes.head_dim,)
    tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (sizes.vocab, *hidden)}
    for index in range(sizes.layers):
        tensors.update({f"model.layers.{index}.{name}": shape for name, shape in layer.items()})
    tensors["model.norm.weight"] = hidden
    if not sizes.tied:
        tensors["lm_head.weight"] = (sizes.vocab, *hidden)
    return tensors
