"""The dense families that can be converted, and what differs between them, as data.

All share Llama's module names (``model.layers.{i}.self_attn.q_proj.weight``, ...) but for stacked linear layers. A new
family needs an entry here, one in `photon_train.layouts` for what its layers hold, and one in
`photon_train.models.families_photon` for its classes and rotation, or names the family whose layers compute the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from photon_train.accounting.shape import Shape
from photon_train.conversion.unsupported import refusal
from photon_train.errors import PhotonError
from photon_train.layouts import LAYOUTS
from photon_train.linears import FUSED
from photon_train.models.experts_photon import EXPERTS

# Of config.json: what describes the dense checkpoint as an object, not its architecture.
_BOOKKEEPING = ("architectures", "transformers_version", "_name_or_path", "dtype", "torch_dtype", "auto_map")


@dataclass(frozen=True)
class Family:
    """What the conversion has to know about one dense family, beside its `Layout`.

    Attributes:
        model_type: The ``model_type`` of the family's ``config.json``.
        models: Published models of the family, for the documentation.
        layers: Family whose classes the PHOTON model is made of, where it is another one.
        specials: What its attention or its stack does that Llama's does not, and how it is served.
    """

    model_type: str
    models: str
    layers: str | None = None
    specials: str = ""


FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family("llama", "Llama 2, 3.x, SmolLM 1, 2"),
        Family("mistral", "Mistral 7B, Nemo, Small 24B", specials="sliding_window: the window may not be longer"),
        Family("qwen2", "Qwen 2, 2.5", specials="biases of queries, keys and values"),
        Family("qwen3", "Qwen 3 (dense)", specials="norms of queries and keys by head"),
        Family("phi3", "Phi 3, 3.5 mini, 4", layers="mistral", specials="stacked matrices, which are taken apart"),
        Family(
            "granite",
            "Granite 3.x (dense)",
            specials="multipliers of embedding, residuals and logits; attention_multiplier scales far scores too",
        ),
        Family("olmo2", "OLMo 2", specials="norms after attention and MLP, and of all queries and keys of a layer"),
        Family("seed_oss", "Seed-OSS 36B", specials="attention_dropout is switched off, residual_dropout stays"),
        Family("smollm3", "SmolLM3 3B", specials="layers without rotation (no_rope_layers): so are their far keys"),
        Family(
            "gemma2",
            "Gemma 2",
            specials="local layers stay; attn_logit_softcapping bounds near and far scores (not by triton or flex "
            "kernels: refused); query_pre_attn_scalar; final_logit_softcapping",
        ),
        Family(
            "gemma3_text",
            "Gemma 3 270M, 1B",
            specials="local layers stay; a rotation for each kind of layer; query_pre_attn_scalar",
        ),
        Family(
            "olmo3",
            "OLMo 3",
            specials="as `olmo2`; local layers stay; a rotation for each kind of layer",
        ),
        Family(
            "cohere2",
            "Command R7B, Command A",
            specials="local layers stay; neighbouring dimensions are rotated together, global layers are not rotated; "
            "LayerNorm, attention and MLP side by side, logit_scale",
        ),
        Family(
            "exaone4",
            "EXAONE 4.0",
            specials="local layers stay, global ones are not rotated where there are local ones; norms of heads",
        ),
        Family(
            "glm4",
            "GLM-4 0414",
            specials="the first half of a head is rotated, neighbouring dimensions together; norms before and after; "
            "gate and up projection are one",
        ),
        Family("ministral3", "Ministral 3", specials="queries grow with their position (llama_4_scaling_beta)"),
        Family(
            "gpt_oss",
            "gpt-oss 20B, 120B",
            specials="a sink logit per head, once in the softmax of near and far keys (not by flex kernels: refused); "
            "local layers stay; experts with biases in every layer; MXFP4 weights are dequantised",
        ),
        Family("granitemoe", "Granite 3.x MoE 1B-A400M, 3B-A800M", specials="as `granite`; experts in every layer"),
        Family("mixtral", "Mixtral 8x7B, 8x22B", specials="experts in every layer; sliding_window as `mistral`"),
        Family("olmoe", "OLMoE 1B-7B", specials="experts in every layer; norms of all queries and keys; clip_qkv"),
        Family(
            "qwen3_moe",
            "Qwen 3 30B-A3B, 235B-A22B, Coder",
            specials="experts in every layer (mlp_only_layers is refused); norms of queries and keys by head",
        ),
        Family(
            "lfm2",
            "LFM2 350M to 2.6B",
            specials="hybrid: layers of short convolutions stay; norms of queries and keys by head",
        ),
        Family(
            "qwen3_5_text",
            "Qwen 3.5 (dense), its language model alone",
            specials="hybrid: gated delta nets stay; a quarter of a head is rotated; a gate on the attention's output",
        ),
    )
}


def family_of(config: Any) -> Family:
    """The family of a dense model's configuration.

    Args:
        config: A `PretrainedConfig`, or the dict of a ``config.json``.

    Raises:
        PhotonError: if the family is not supported; the message says why, and lists those that are.
    """
    model_type = config.get("model_type") if isinstance(config, dict) else config.model_type
    if model_type not in FAMILIES:
        raise PhotonError(refusal(model_type, FAMILIES))
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
    if getattr(config, "mlp_only_layers", None) or getattr(config, "decoder_sparse_step", 1) != 1:
        raise PhotonError(
            f"config.json: mlp_only_layers={config.mlp_only_layers} and decoder_sparse_step="
            f"{config.decoder_sparse_step}: only models with experts in every layer ([] and 1) can be converted"
        )
    if "output_router_logits" in settings:
        settings["output_router_logits"] = False  # of the load-balancing loss of pretraining, which is not computed
    if getattr(config, "use_bidirectional_attention", None):
        raise PhotonError("config.json: use_bidirectional_attention: PHOTON models are causal: take another checkpoint")
    if family.model_type == "seed_oss":
        settings["attention_dropout"] = 0.0  # which published checkpoints set, for a training long ago
    rope = dict(settings.get("rope_parameters") or {})
    if any(isinstance(kind, dict) and kind.get("rope_type") in ("dynamic", "longrope") for kind in rope.values()):
        raise PhotonError(
            "config.json: rope_parameters: rope_type dynamic or longrope for one kind of layer turns keys by the "
            "length of the text, which a cache cannot follow: set it to yarn or linear with the same factor"
        )
    if rope.get("rope_type") == "dynamic":
        raise PhotonError(
            "config.json: rope_parameters.rope_type=dynamic turns keys by the length of the text, which a cache cannot "
            "follow: set it to yarn or linear with the same factor, or start from the model before it was extended"
        )
    if family.layers is not None and rope.get("partial_rotary_factor", 1.0) != 1.0:
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
    sizes = Shape.of(config)
    for fused in sizes.fused:
        parts = FUSED[fused]
        if linear in parts:
            return f"{block}.{fused}.{kind}", sum(sizes.linears[part][0] for part in parts[: parts.index(linear)])
    return name, None


def dense_tensors(config: Any) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a checkpoint of this configuration must hold.

    The output head is not among them where it shares the embedding's weight.

    Args:
        config: The dense model's configuration object.

    Raises:
        PhotonError: if the family is not supported.
    """
    family_of(config)
    sizes, layout = Shape.of(config), LAYOUTS[config.model_type]
    hidden = (sizes.hidden,)
    layer: dict[str, tuple[int, ...]] = {name: (size,) for name, size in sizes.vectors.items()}
    for name, shape in sizes.modules.items():
        layer[f"{layout.block(name)}.{name}.weight"] = shape
    if sizes.mixture is not None:
        experts = EXPERTS[config.model_type]
        held = {experts.router: (sizes.mixture.count, *hidden)}
        held |= {f"experts.{name}": shape for name, shape in (sizes.mixture.held | sizes.mixture.biases).items()}
        if sizes.mixture.is_biased:
            held[f"{experts.router.removesuffix('weight')}bias"] = (sizes.mixture.count,)
        for name, shape in held.items():
            stored = experts.stored(f"layer.{experts.block}.{name}", shape)
            layer.update({each.removeprefix("layer."): size for each, size in stored.items()})
    recurrent = {}
    if sizes.mixer is not None:
        recurrent = {name: shape for name, shape in layer.items() if not name.startswith("self_attn.")}
        linears = {f"{name}.weight": shape for name, shape in sizes.mixer.linears.items()}
        recurrent |= {f"{sizes.mixer.block}.{name}": shape for name, shape in (linears | sizes.mixer.others).items()}
    tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (sizes.vocab, *hidden)}
    for index in range(sizes.layers):
        held = recurrent if index in sizes.recurrent else layer
        tensors.update({f"model.layers.{index}.{name}": shape for name, shape in held.items()})
    tensors[f"model.{layout.final_norm}.weight"] = hidden
    if not sizes.tied:
        tensors["lm_head.weight"] = (sizes.vocab, *hidden)
    return tensors
