"""The dense families that can be converted, and what differs between them, as data.

The families' layer classes live in `photon_train.models`; a new family needs an entry in both registries, or names the
family whose layers compute the same function.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from photon_train.accounting.shape import Shape
from photon_train.errors import PhotonError
from photon_train.linears import ATTENTION, FUSED, MLP

# Of config.json: what describes the dense checkpoint as an object, not its architecture.
_BOOKKEEPING = ("architectures", "transformers_version", "_name_or_path", "dtype", "torch_dtype", "auto_map")


@dataclass(frozen=True)
class Family:
    """What the conversion has to know about one dense family.

    All families share Llama's module names (``model.layers.{i}.self_attn.q_proj.weight``, ...) but for stacked
    linear layers; the fields say what a decoder layer holds beyond Llama's weights.

    Attributes:
        model_type: The ``model_type`` of the family's ``config.json``.
        biases: Linear layers that always have a bias.
        biases_by_key: Linear layers that have a bias when the named key of the config is true.
        head_norms: Whether queries and keys are normalised per head (``q_norm``, ``k_norm``).
        layers: Family whose classes the PHOTON model is made of, where it is another one.
        is_fused: Whether linear layers are stored stacked (``qkv_proj``, ``gate_up_proj``).
    """

    model_type: str
    biases: tuple[str, ...] = ()
    biases_by_key: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: MappingProxyType({}))
    head_norms: bool = False
    layers: str | None = None
    is_fused: bool = False


FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family("llama", biases_by_key={"attention_bias": ATTENTION, "mlp_bias": MLP}),
        Family("mistral"),
        Family("qwen2", biases=FUSED["qkv_proj"]),
        Family("qwen3", biases_by_key={"attention_bias": ATTENTION}, head_norms=True),
        # Mistral's function from stacked matrices.
        Family("phi3", layers="mistral", is_fused=True),
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


def check_rope_type(content: dict[str, Any]) -> None:
    """Check the kind of rotation that a ``config.json`` names.

    Args:
        content: The file's content.

    Raises:
        PhotonError: for one that transformers does not know, or knows by another name.
    """
    rope = content.get("rope_scaling") or content.get("rope_parameters")
    if not isinstance(rope, dict):
        return
    name = rope.get("rope_type") or rope.get("type") or "default"
    if name == "su":
        raise PhotonError(
            "rope type 'su' is the former name of longrope, which transformers does not read: write longrope"
        )
    known = sorted({"default", *ROPE_INIT_FUNCTIONS})
    if name not in known:
        hint = ": for text alone it is the same as default" if name == "mrope" else ""
        raise PhotonError(f"rope type {name!r} is not one of {', '.join(known)}{hint}")


def check_config(config: PretrainedConfig) -> None:
    """Check that transformers can build the dense model; no weight is allocated.

    Raises:
        PhotonError: naming the key where it is known.
    """
    padding = config.pad_token_id
    if padding is not None and not -config.vocab_size <= padding < config.vocab_size:
        raise PhotonError(
            f"pad_token_id={padding} has no row in the embedding (vocab_size={config.vocab_size}): set it to null, or "
            "to the id of a token"
        )
    try:
        with torch.device("meta"):
            AutoModelForCausalLM.from_config(config)
    except Exception as error:  # whatever a wrong value leads to, such as a KeyError for an activation
        reason = " ".join(str(error).split())
        raise PhotonError(
            f"transformers cannot build a model of it ({type(error).__name__}: {reason}): correct that value"
        ) from error


def layer_config(config: PretrainedConfig, seq_len: int) -> dict[str, Any]:
    """The configuration of the family whose classes the PHOTON model is made of, with its ``model_type``.

    A rotation that depends on the length of the text (``longrope``) is fixed to what it is at `seq_len`: keys that lie
    in a cache cannot be rotated again, and a PHOTON model is one function at any length.

    Args:
        config: The dense model's configuration object.
        seq_len: Tokens per sequence of the training.

    Raises:
        PhotonError: for a rotation that PHOTON models cannot serve, naming the key.
    """
    family = family_of(config)
    settings = config.to_dict()
    if family.layers is not None:
        known = AutoConfig.for_model(family.layers).to_dict()
        settings = {key: getattr(config, key) for key in known if hasattr(config, key)}
        settings["model_type"] = family.layers
    settings = {key: value for key, value in settings.items() if key not in _BOOKKEEPING}
    rope = dict(settings.get("rope_parameters") or {})
    if rope.get("rope_type") == "dynamic":
        raise PhotonError(
            "config.json: rope_parameters.rope_type=dynamic turns keys by the length of the text, which a cache cannot "
            "follow: set it to yarn or linear with the same factor, or start from the model before it was extended"
        )
    if family.is_fused and rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise PhotonError(
            f"config.json: partial_rotary_factor={rope['partial_rotary_factor']} is not supported: only models of "
            f"family {family.model_type} that rotate whole heads can be converted"
        )
    if rope.get("rope_type") == "longrope":
        original = rope.get("original_max_position_embeddings") or config.original_max_position_embeddings
        factors = rope["long_factor" if seq_len > original else "short_factor"]
        settings["rope_parameters"] = {**rope, "short_factor": factors, "long_factor": factors}
    return settings


def stored_as(config: Any, name: str) -> tuple[str, int | None]:
    """Where a checkpoint stores a linear layer's tensor.

    Args:
        config: The dense model's configuration.
        name: A tensor under Llama's names, such as ``model.layers.3.self_attn.k_proj.weight``.

    Returns:
        The stored tensor, and the first of its rows that belong to `name`; None where it is stored by itself.
    """
    module, _, kind = name.rpartition(".")
    block, _, linear = module.rpartition(".")
    if family_of(config).is_fused:
        for fused, parts in FUSED.items():
            if linear in parts:
                linears = Shape.of(config).linears
                return f"{block}.{fused}.{kind}", sum(linears[part][0] for part in parts[: parts.index(linear)])
    return name, None


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
    linears = dict(sizes.linears)
    if family.is_fused:
        for name, parts in FUSED.items():
            linears[name] = (sum(linears.pop(part)[0] for part in parts), sizes.hidden)
    for name, shape in linears.items():
        block = "self_attn" if name in (*ATTENTION, "qkv_proj") else "mlp"
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
