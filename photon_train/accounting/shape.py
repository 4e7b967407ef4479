"""Sizes of a dense family's model, and what the dense model costs.

A *dense configuration* is any object or dict with the keys of a Llama-like ``config.json``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from photon_train.linears import ATTENTION, FUSED, MLP


def _get(config: Any, key: str, default: Any = None) -> Any:
    value = config.get(key) if isinstance(config, Mapping) else getattr(config, key, None)
    return default if value is None else value


@dataclass(frozen=True)
class Shape:
    """Sizes of a dense family's model.

    Attributes:
        hidden: Width of the residual stream.
        layers: Decoder layers of the dense model.
        vocab: Rows of the embedding.
        heads, kv_heads, head_dim: Attention heads, key-value heads, dimension of one.
        linears: Name -> (outputs, inputs) of a layer's linear maps.
        layer_vectors: Biases and norm weights of a layer, elements.
        head_norms: Whether queries and keys are normalised.
        tied: Whether the head shares the embedding.
        windows: Per dense layer, the tokens it looks back on (None: all).
    """

    hidden: int
    layers: int
    vocab: int
    heads: int
    kv_heads: int
    head_dim: int
    linears: dict[str, tuple[int, int]]
    layer_vectors: int
    head_norms: bool
    tied: bool
    windows: tuple[int | None, ...]

    @classmethod
    def of(cls, config: Any) -> Shape:
        """Read a dense configuration, or a `PhotonConfig`, which has its keys."""
        hidden, inner = _get(config, "hidden_size"), _get(config, "intermediate_size")
        heads = _get(config, "num_attention_heads")
        kv_heads = _get(config, "num_key_value_heads", heads)
        head_dim = _get(config, "head_dim", hidden // heads)
        model_type = _get(config, "base_model_type", _get(config, "model_type"))
        queries, keys = heads * head_dim, kv_heads * head_dim
        linears = {
            "q_proj": (queries, hidden),
            "k_proj": (keys, hidden),
            "v_proj": (keys, hidden),
            "o_proj": (hidden, queries),
            "gate_proj": (inner, hidden),
            "up_proj": (inner, hidden),
            "down_proj": (hidden, inner),
        }
        biased = set(ATTENTION if _get(config, "attention_bias", False) else ())
        biased |= set(FUSED["qkv_proj"]) if model_type == "qwen2" else set()
        biased |= set(MLP) if _get(config, "mlp_bias", False) else set()
        norms = 2 * hidden + (2 * head_dim if model_type == "qwen3" else 0)
        layers = _get(config, "num_hidden_layers")
        # Qwen's config.json states a window also where it is switched off.
        window = _get(config, "sliding_window") if _get(config, "use_sliding_window", True) else None
        kinds = _get(config, "layer_types") or ["sliding_attention" if window else "full_attention"] * layers
        return cls(
            hidden=hidden,
            layers=layers,
            vocab=_get(config, "vocab_size"),
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            linears=linears,
            layer_vectors=norms + sum(linears[name][0] for name in biased),
            head_norms=model_type == "qwen3",
            tied=_get(config, "tie_word_embeddings", False),
            windows=tuple(window if kind == "sliding_attention" else None for kind in kinds[:layers]),
        )

    @property
    def layer_matrices(self) -> int:
        """Weights of one layer's linear maps."""
        return sum(outputs * inputs for outputs, inputs in self.linears.values())

    @property
    def layer(self) -> int:
        """Parameters of one decoder layer."""
        return self.layer_matrices + self.layer_vectors

    @property
    def shared(self) -> int:
        """Parameters of embedding, final norm and head."""
        return self.vocab * self.hidden * (1 if self.tied else 2) + self.hidden

    @property
    def kv(self) -> int:
        """Elements of one key and value."""
        return 2 * self.kv_heads * self.head_dim

    def flops(self, weights: float, keys: float) -> float:
        """2 FLOPs per weight, 4 per key seen and query dimension."""
        return 2.0 * weights + 4.0 * keys * self.heads * self.head_dim


def dense_parameters(config: Any) -> int:
    """Parameters of a dense model; a tied head counts once."""
    shape = Shape.of(config)
    return shape.shared + shape.layers * shape.layer


def dense_cache_bytes(config: Any, tokens: int, dtype_bytes: int = 2) -> int:
    """Bytes of the dense model's keys and values for one sequence of `tokens`; sliding layers keep their window."""
    shape = Shape.of(config)
    held = sum(tokens if window is None else min(tokens, window) for window in shape.windows)
    return held * shape.kv * dtype_bytes


def dense_flops(config: Any, context: int) -> float:
    """Forward FLOPs of the token after `context` tokens: 2 per weight, 4 per key seen and query dimension."""
    shape = Shape.of(config)
    keys = sum(context if window is None else min(context, window) for window in shape.windows)
    return shape.flops(shape.layers * shape.layer_matrices + shape.vocab * shape.hidden, keys)
