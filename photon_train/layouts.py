"""What a decoder layer of each dense family holds beside Llama's linear maps, as data, by ``model_type``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from photon_train.linears import ATTENTION, FUSED, MLP

_BEFORE = ("input_layernorm", "post_attention_layernorm")
_AFTER = ("post_attention_layernorm", "post_feedforward_layernorm")
_GEMMA = (*_BEFORE, "pre_feedforward_layernorm", "post_feedforward_layernorm")


@dataclass(frozen=True)
class Layout:
    """Vectors of a decoder layer, and which of its linear maps are stored as one.

    Attributes:
        norms: Norms of the residual stream's width.
        query_norms: How queries and keys are normalised: by ``head``, by ``layer`` (all heads at once), or not.
        biases: Linear maps that always have a bias.
        biases_by_key: Linear maps that have a bias when the named key of the configuration is true.
        fused: Linear maps that are stored as one (names of `FUSED`).
        experts: Whether every layer has experts in place of one MLP.
        expert_biases: Whether these and their router have biases, and matrices as (inputs, outputs).
        sink_logits: Whether every head has a logit of its own in the softmax.
    """

    norms: tuple[str, ...] = _BEFORE
    query_norms: str | None = None
    biases: tuple[str, ...] = ()
    biases_by_key: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: MappingProxyType({}))
    fused: tuple[str, ...] = ()
    experts: bool = False
    expert_biases: bool = False
    sink_logits: bool = False

    def vectors(
        self, linears: Mapping[str, tuple[int, int]], hidden: int, head_dim: int, is_set: Callable[[str], bool]
    ) -> dict[str, int]:
        """Name under the layer -> elements of every norm and bias.

        Args:
            linears: Name -> (outputs, inputs), none stored as one.
            hidden: Width of the residual stream.
            head_dim: Dimension of a head.
            is_set: Whether a key of the configuration is true.
        """
        found = {f"{name}.weight": hidden for name in self.norms}
        if self.query_norms is not None:
            whole = self.query_norms == "layer"
            for name in ("q", "k"):
                found[f"self_attn.{name}_norm.weight"] = linears[f"{name}_proj"][0] if whole else head_dim
        if self.sink_logits:
            found["self_attn.sinks"] = linears["q_proj"][0] // head_dim
        biased = {*self.biases, *(name for key, names in self.biases_by_key.items() if is_set(key) for name in names)}
        for name in linears:
            if name in biased:
                found[f"{'self_attn' if name in ATTENTION else 'mlp'}.{name}.bias"] = linears[name][0]
        return found


_BIASED_ATTENTION = {"attention_bias": ATTENTION}
_BIASED_QKV = {"attention_bias": FUSED["qkv_proj"]}
LAYOUTS: dict[str, Layout] = {
    "llama": Layout(biases_by_key={**_BIASED_ATTENTION, "mlp_bias": MLP}),
    "mistral": Layout(),
    "phi3": Layout(fused=("qkv_proj", "gate_up_proj")),
    "qwen2": Layout(biases=FUSED["qkv_proj"]),
    "qwen3": Layout(query_norms="head", biases_by_key=_BIASED_ATTENTION),
    "granite": Layout(biases_by_key={**_BIASED_ATTENTION, "mlp_bias": MLP}),
    "olmo2": Layout(norms=_AFTER, query_norms="layer", biases_by_key=_BIASED_ATTENTION),
    "seed_oss": Layout(biases_by_key={**_BIASED_QKV, "attention_out_bias": ("o_proj",), "mlp_bias": MLP}),
    "smollm3": Layout(biases_by_key={**_BIASED_ATTENTION, "mlp_bias": MLP}),
    "gemma2": Layout(norms=_GEMMA, biases_by_key=_BIASED_ATTENTION),
    "gemma3_text": Layout(norms=_GEMMA, query_norms="head", biases_by_key=_BIASED_ATTENTION),
    "olmo3": Layout(norms=_AFTER, query_norms="layer", biases_by_key=_BIASED_ATTENTION),
    "cohere2": Layout(norms=("input_layernorm",), biases_by_key=_BIASED_ATTENTION),
    "exaone4": Layout(norms=_AFTER, query_norms="head"),
    "glm4": Layout(
        norms=(*_BEFORE, "post_self_attn_layernorm", "post_mlp_layernorm"),
        biases_by_key=_BIASED_QKV,
        fused=("gate_up_proj",),
    ),
    "ministral3": Layout(),
    "gpt_oss": Layout(biases_by_key=_BIASED_ATTENTION, experts=True, expert_biases=True, sink_logits=True),
    "granitemoe": Layout(biases_by_key=_BIASED_ATTENTION, experts=True),
    "mixtral": Layout(experts=True),
    "olmoe": Layout(query_norms="layer", biases_by_key=_BIASED_ATTENTION, experts=True),
    "qwen3_moe": Layout(query_norms="head", biases_by_key=_BIASED_ATTENTION, experts=True),
}
