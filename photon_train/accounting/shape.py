"""Sizes of a dense family's model, and what the dense model costs.

A *dense configuration* is any object or dict with the keys of a Llama-like ``config.json``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from photon_train.layouts import LAYOUTS, MixerSizes
from photon_train.linears import ATTENTION, FUSED, MLP


def _get(config: Any, key: str, default: Any = None) -> Any:
    value = config.get(key) if isinstance(config, Mapping) else getattr(config, key, None)
    return default if value is None else value


@dataclass(frozen=True)
class Mixture:
    """Sizes of the experts that a layer holds in place of one MLP.

    Attributes:
        count: Experts of a layer; active: those that a token goes through.
        inner: Width of one.
        hidden: Width of the residual stream.
        is_biased: Whether experts and router have biases; matrices are then (inputs, outputs).
    """

    count: int
    active: int
    inner: int
    hidden: int
    is_biased: bool = False

    @property
    def held(self) -> dict[str, tuple[int, int, int]]:
        """Name -> shape of the experts' weights as the layer holds them."""
        matrices = {"gate_up_proj": (2 * self.inner, self.hidden), "down_proj": (self.hidden, self.inner)}
        return {name: (self.count, *(shape[::-1] if self.is_biased else shape)) for name, shape in matrices.items()}

    @property
    def biases(self) -> dict[str, tuple[int, int]]:
        """Name -> shape of the experts' biases."""
        if not self.is_biased:
            return {}
        return {"gate_up_proj_bias": (self.count, 2 * self.inner), "down_proj_bias": (self.count, self.hidden)}

    @property
    def router(self) -> int:
        """Weights of the router, which every token goes through."""
        return self.count * (self.hidden + self.is_biased)

    @property
    def expert(self) -> int:
        """Weights of one expert, biases included."""
        return 3 * self.inner * self.hidden + self.is_biased * (2 * self.inner + self.hidden)


@dataclass(frozen=True)
class Shape:
    """Sizes of a dense family's model.

    Attributes:
        hidden: Width of the residual stream.
        layers: Decoder layers of the dense model.
        vocab: Rows of the embedding.
        heads, kv_heads, head_dim: Attention heads, key-value heads, dimension of one.
        linears: Name -> (outputs, inputs) of the linear maps of a layer with attention, by the family's names; those of
            experts are not among them.
        mixture: The experts of each layer; None where it has one MLP.
        mixer: What the recurrent layers of a hybrid have in place of attention; None where there are none.
        vectors: Name -> elements of the biases and norm weights of a layer with attention.
        fused: Linear maps of `FUSED` that the layer holds as one.
        head_norms: Whether queries and keys are normalised.
        tied: Whether the head shares the embedding.
        windows: Per dense layer, the tokens whose keys it keeps (None: all); 0 in recurrent layers.
        names: Llama's names of the family's linear maps -> its own.
    """

    hidden: int
    layers: int
    vocab: int
    heads: int
    kv_heads: int
    head_dim: int
    linears: dict[str, tuple[int, int]]
    mixture: Mixture | None
    mixer: MixerSizes | None
    vectors: dict[str, int]
    fused: tuple[str, ...]
    head_norms: bool
    tied: bool
    windows: tuple[int | None, ...]
    names: dict[str, str]

    @classmethod
    def of(cls, config: Any) -> Shape:
        """Read a dense configuration, or a `PhotonConfig`, which has its keys.

        Of a dict only what it says is read: where its family has defaults, make it an object first.
        """
        hidden, inner = _get(config, "hidden_size"), _get(config, "intermediate_size")
        model_type = _get(config, "base_model_type", _get(config, "model_type"))
        layout, mixture = LAYOUTS[model_type], None
        heads = _get(config, "num_attention_heads")
        kv_heads = _get(config, "num_key_value_heads", heads)
        head_dim = _get(config, "head_dim", hidden // heads)
        queries, keys = heads * head_dim, kv_heads * head_dim
        linears = {
            "q_proj": (2 * queries if layout.gated else queries, hidden),
            "k_proj": (keys, hidden),
            "v_proj": (keys, hidden),
            "o_proj": (hidden, queries),
        }
        if not layout.experts:
            inner = _adjusted(config, inner)
            linears |= {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
        else:
            width = _get(config, "moe_intermediate_size", inner)  # some families' intermediate_size is of an expert
            count = _get(config, "num_experts") or _get(config, "num_local_experts")  # a dict has one of the names
            mixture = Mixture(count, _get(config, "num_experts_per_tok"), width, hidden, layout.expert_biases)
        names = dict(zip((*ATTENTION, *MLP), layout.named((*ATTENTION, *MLP)), strict=True))
        linears = {names[name]: size for name, size in linears.items()}
        layers = _get(config, "num_hidden_layers")
        # Qwen's config.json states a window also where it is switched off.
        window = _get(config, "sliding_window") if _get(config, "use_sliding_window", True) else None
        kinds = _get(config, "layer_types") or ["sliding_attention" if window else "full_attention"] * layers
        recurrent, mixer = layout.mixer and layout.mixer.kind, None
        if recurrent in kinds[:layers]:
            mixer = layout.mixer.sizes(lambda key: _get(config, key))
        held = {"sliding_attention": window, recurrent: 0}
        return cls(
            hidden=hidden,
            layers=layers,
            vocab=_get(config, "vocab_size"),
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            linears=linears,
            mixture=mixture,
            mixer=mixer,
            vectors=layout.vectors(linears, hidden, head_dim, lambda key: bool(_get(config, key, False))),
            fused=layout.fused,
            head_norms=layout.query_norms is not None,
            tied=_get(config, "tie_word_embeddings", False),
            windows=tuple(held.get(kind) for kind in kinds[:layers]),
            names=names,
        )

    @property
    def recurrent(self) -> list[int]:
        """Layers that have a `mixer` in place of attention."""
        return [layer for layer, window in enumerate(self.windows) if window == 0]

    @property
    def modules(self) -> dict[str, tuple[int, int]]:
        """Name -> (outputs, inputs) of a layer's linear maps as it holds them."""
        found = dict(self.linears)
        for name in self.fused:
            found[name] = (sum(found.pop(part)[0] for part in FUSED[name]), self.hidden)
        return found

    @property
    def layer_vectors(self) -> int:
        """Biases and norm weights of a layer, elements."""
        return sum(self.vectors.values())

    @property
    def inner(self) -> int:
        """Inner states of a token's MLP, of all its experts together."""
        if self.mixture is not None:
            return self.mixture.active * self.mixture.inner
        return self.linears[self.names["up_proj"]][0]

    def _matrices(self, experts: int) -> int:
        own = sum(outputs * inputs for outputs, inputs in self.linears.values())
        return own if self.mixture is None else own + self.mixture.router + experts * self.mixture.expert

    @property
    def layer_matrices(self) -> int:
        """Weights of one layer's linear maps, all experts included."""
        return self._matrices(0 if self.mixture is None else self.mixture.count)

    @property
    def active_matrices(self) -> int:
        """Weights of one layer's linear maps that a token goes through."""
        return self._matrices(0 if self.mixture is None else self.mixture.active)

    @property
    def layer(self) -> int:
        """Parameters of one decoder layer with attention."""
        return self.layer_matrices + self.layer_vectors

    @property
    def all_layers(self) -> int:
        """Parameters of all decoder layers."""
        other = 0
        if self.mixer is not None:
            own = sum(size for name, size in self.vectors.items() if name.startswith("self_attn."))
            other = self.mixer.parameters - self._attention - own
        return self.layers * self.layer + len(self.recurrent) * other

    @property
    def all_matrices(self) -> int:
        """Weights of all layers' linear maps (and convolutions) that a token goes through."""
        other = 0 if self.mixer is None else self.mixer.matrices - self._attention
        return self.layers * self.active_matrices + len(self.recurrent) * other

    @property
    def attention(self) -> dict[str, tuple[int, int]]:
        """Of `linears` those of attention."""
        return {name: self.linears[name] for name in map(self.names.get, ATTENTION)}

    @property
    def linear_names(self) -> set[str]:
        """Names of all layers' linear maps, none stored as one."""
        return {*self.linears, *(self.mixer.linears if self.mixer else ())}

    @property
    def _attention(self) -> int:
        """Weights of a layer's attention."""
        return sum(map(math.prod, self.attention.values()))

    def state_bytes(self, dtype_bytes: int) -> int:
        """Bytes of the states of all recurrent layers for one sequence."""
        return len(self.recurrent) * self.mixer.state_bytes(dtype_bytes) if self.mixer else 0

    @property
    def shared(self) -> int:
        """Parameters of embedding, final norm and head."""
        return self.vocab * self.hidden * (1 if self.tied else 2) + self.hidden

    @property
    def kv(self) -> int:
        """Elements of one key and value."""
        return 2 * self.kv_heads * self.head_dim

    def flops(self, weights: float, keys: float) -> float:
        """2 FLOPs per weight, 4 per key seen and query dimension, 6 per number of a recurrent state: it is read with
        the key, changed, and read with the query."""
        states = len(self.recurrent) * self.mixer.recurrent_state if self.mixer else 0
        return 2.0 * weights + 4.0 * keys * self.heads * self.head_dim + 6.0 * states


def _adjusted(config: Any, inner: int) -> int:
    """The width of the MLP where the configuration states another (LFM2 takes two thirds, and rounds up)."""
    if not _get(config, "block_auto_adjust_ff_dim", False):
        return inner
    inner, factor = int(2 * inner / 3), _get(config, "block_ffn_dim_multiplier")
    if factor is None:
        return inner
    step = _get(config, "block_multiple_of")
    return step * -(-int(factor * inner) // step)


def dense_parameters(config: Any) -> int:
    """Parameters of a dense model; a tied head counts once."""
    shape = Shape.of(config)
    return shape.shared + shape.all_layers


def active_parameters(config: Any, total: int) -> int:
    """Parameters that a token goes through.

    Args:
        config: A dense configuration, or a `PhotonConfig`.
        total: The model's parameters (`dense_parameters` or `photon_parameters`).
    """
    shape = Shape.of(config)
    return total - shape.layers * (shape.layer_matrices - shape.active_matrices)


def dense_cache_bytes(config: Any, tokens: int, dtype_bytes: int = 2) -> int:
    """Bytes of the dense model's keys, values and states for one sequence of `tokens`; sliding layers keep their
    window."""
    shape = Shape.of(config)
    held = sum(tokens if window is None else min(tokens, window) for window in shape.windows)
    return held * shape.kv * dtype_bytes + shape.state_bytes(dtype_bytes)


def dense_flops(config: Any, context: int) -> float:
    """Forward FLOPs of the token after `context` tokens: 2 per weight, 4 per key seen and query dimension."""
    shape = Shape.of(config)
    keys = sum(context if window is None else min(context, window) for window in shape.windows)
    return shape.flops(shape.all_matrices + shape.vocab * shape.hidden, keys)
