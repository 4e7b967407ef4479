"""What a decoder layer of each dense family holds beside Llama's linear maps, as data, by ``model_type``.

Hybrids have layers of two kinds: those with attention, and recurrent ones, whose `Mixer` keeps states of constant size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from photon_train.linears import ATTENTION, FUSED, LINEARS, MLP

_BEFORE = ("input_layernorm", "post_attention_layernorm")
_AFTER = ("post_attention_layernorm", "post_feedforward_layernorm")
_GEMMA = (*_BEFORE, "pre_feedforward_layernorm", "post_feedforward_layernorm")


@dataclass(frozen=True)
class MixerSizes:
    """Sizes of what a recurrent layer has in place of attention.

    Attributes:
        block: Its name under the layer.
        linears: Name -> (outputs, inputs) of its linear maps.
        others: Name -> shape of its other parameters.
        conv_state: Elements of its convolution's state, which has the type of the layer's input.
        recurrent_state: Elements of its recurrent state, which is held in fp32.
        kept: Numbers in fp32 that autograd keeps of a token's recurrence in transformers' reference code; kernels of
            flash-linear-attention keep fewer.
    """

    block: str
    linears: Mapping[str, tuple[int, int]]
    others: Mapping[str, tuple[int, ...]]
    conv_state: int
    recurrent_state: int = 0
    kept: int = 0

    @property
    def matrices(self) -> int:
        """Weights that a token is multiplied by: of linear maps and convolution."""
        return sum(map(math.prod, (*self.linears.values(), *(s for s in self.others.values() if len(s) > 1))))

    @property
    def parameters(self) -> int:
        """All parameters."""
        return sum(map(math.prod, (*self.linears.values(), *self.others.values())))

    def state_bytes(self, dtype_bytes: int) -> int:
        """Bytes of the states of one sequence."""
        return self.conv_state * dtype_bytes + self.recurrent_state * 4


def short_convolution(get: Callable[[str], Any]) -> MixerSizes:
    """LFM2's: a gated depthwise convolution. `get` reads a key of the configuration."""
    hidden, kernel = get("hidden_size"), get("conv_L_cache")
    biases = {"conv.bias": (hidden,), "in_proj.bias": (3 * hidden,), "out_proj.bias": (hidden,)}
    return MixerSizes(
        "conv",
        {"in_proj": (3 * hidden, hidden), "out_proj": (hidden, hidden)},
        {"conv.weight": (hidden, 1, kernel), **(biases if get("conv_bias") else {})},
        hidden * kernel,
    )


_CHUNK = 64  # tokens that the gated delta rule computes together


def gated_delta_net(get: Callable[[str], Any]) -> MixerSizes:
    """Qwen 3.5's: linear attention by the gated delta rule, its inputs convolved. `get` as above."""
    hidden, kernel = get("hidden_size"), get("linear_conv_kernel_dim")
    heads, key_heads = get("linear_num_value_heads"), get("linear_num_key_heads")
    key_size, size = get("linear_key_head_dim"), get("linear_value_head_dim")
    values, convolved = heads * size, 2 * key_heads * key_size + heads * size
    linears = {"in_proj_qkv": convolved, "in_proj_z": values, "in_proj_b": heads, "in_proj_a": heads}
    return MixerSizes(
        "linear_attn",
        {**{name: (outputs, hidden) for name, outputs in linears.items()}, "out_proj": (hidden, values)},
        {"conv1d.weight": (convolved, 1, kernel), "dt_bias": (heads,), "A_log": (heads,), "norm.weight": (size,)},
        convolved * kernel,
        heads * key_size * size,
        # Queries and keys (raw, normalised, decayed, times beta, solved), values likewise, five rows of a token with
        # all others of its chunk, and a chunk's state three times.
        heads * (9 * key_size + 5 * size + 5 * _CHUNK + 3 * key_size * size // _CHUNK),
    )


@dataclass(frozen=True)
class Mixer:
    """What the recurrent layers of a hybrid have in place of attention.

    Attributes:
        kind: What ``layer_types`` calls such a layer.
        linears: Names of its linear maps.
        sizes: From a reader of the configuration's keys to its sizes.
    """

    kind: str
    linears: tuple[str, ...]
    sizes: Callable[[Callable[[str], Any]], MixerSizes]


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
        mlp, final_norm: Names of a layer's MLP, and of the norm after all layers.
        names: Llama's name -> the family's own, of linear maps and norms of heads.
        gated: Whether the map of queries also gives a gate on the attention's output, of the same size.
        mixer: What recurrent layers have in place of attention; None: there are none.
        expert_biases: Whether these and their router have biases, and matrices as (inputs, outputs).
        sink_logits: Whether every head has a logit of its own in the softmax.
    """

    norms: tuple[str, ...] = _BEFORE
    query_norms: str | None = None
    biases: tuple[str, ...] = ()
    biases_by_key: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: MappingProxyType({}))
    fused: tuple[str, ...] = ()
    experts: bool = False
    mlp: str = "mlp"
    final_norm: str = "norm"
    names: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    gated: bool = False
    mixer: Mixer | None = None
    expert_biases: bool = False
    sink_logits: bool = False

    def named(self, names: Iterable[str]) -> list[str]:
        """The family's own names for Llama's."""
        return [self.names.get(name, name) for name in names]

    def block(self, linear: str) -> str:
        """The block of a layer that holds one of its own linear maps."""
        return "self_attn" if linear in (*self.named(ATTENTION), "qkv_proj") else self.mlp

    @property
    def linears(self) -> list[str]:
        """Names of all linear maps of its layers, none stored as one."""
        return [*self.named(LINEARS), *(self.mixer.linears if self.mixer else ())]

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
            for name, norm in zip(("q_proj", "k_proj"), self.named(("q_norm", "k_norm")), strict=True):
                found[f"self_attn.{norm}.weight"] = linears[name][0] if whole else head_dim
        if self.sink_logits:
            found["self_attn.sinks"] = linears["q_proj"][0] // head_dim
        biased = {*self.biases, *(name for key, names in self.biases_by_key.items() if is_set(key) for name in names)}
        for name in linears:
            if name in biased:
                found[f"{self.block(name)}.{name}.bias"] = linears[name][0]
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
    "lfm2": Layout(
        norms=("operator_norm", "ffn_norm"),
        query_norms="head",
        mlp="feed_forward",
        final_norm="embedding_norm",
        names={
            "o_proj": "out_proj",
            "gate_proj": "w1",
            "up_proj": "w3",
            "down_proj": "w2",
            "q_norm": "q_layernorm",
            "k_norm": "k_layernorm",
        },
        mixer=Mixer("conv", ("in_proj", "out_proj"), short_convolution),
    ),
    "qwen3_5_text": Layout(
        query_norms="head",
        biases_by_key=_BIASED_ATTENTION,
        gated=True,
        mixer=Mixer(
            "linear_attention",
            ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj"),
            gated_delta_net,
        ),
    ),
}
