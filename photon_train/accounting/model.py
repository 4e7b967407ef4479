"""Parameters, FLOPs and cache bytes in closed form, before any weight is loaded.

A *dense configuration* is any object or dict with the keys of a Llama-like ``config.json``; a *PHOTON configuration*
any object with the attributes of `PhotonConfig`. One element of a cache counts for one head dimension of one head.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from photon_train.linears import ATTENTION, FUSED, LINEARS, MLP


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
        """Read a dense configuration."""
        hidden, inner = _get(config, "hidden_size"), _get(config, "intermediate_size")
        heads = _get(config, "num_attention_heads")
        kv_heads = _get(config, "num_key_value_heads", heads)
        head_dim = _get(config, "head_dim", hidden // heads)
        model_type = _get(config, "model_type")
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


# --- parameters ---


def dense_parameters(config: Any) -> int:
    """Parameters of a dense model; a tied head counts once."""
    shape = Shape.of(config)
    return shape.shared + shape.layers * shape.layer


def new_parameters(photon: Any) -> int:
    """Parameters of chunkers, converters, start state, input scales and memories."""
    shape = Shape.of(photon.base_config)
    hidden, keys = shape.hidden, shape.kv // 2
    total = 0
    for index, level in enumerate(photon.levels):
        total += level["chunk_size"] * hidden**2 + 1
        if photon.conditioning != "memory":
            total += level["num_slots"] * hidden**2 + 1
            total += int(index == 0 and photon.conditioning == "residual")  # its gate
        total += int(level["decoder_layers"] > 0)
    for level in photon.memory_levels:
        if photon.memory_pooling == "latent":  # converters
            total += photon.span(level) * shape.kv * (shape.kv // photon.memory_latent_parts + 1)
            continue
        total += 2 * shape.kv_heads * (photon.span(level) + 1) + 2 * hidden * keys
        if photon.memory_pooling == "linear":
            total += 2 * shape.kv_heads * photon.span(level) * shape.head_dim**2
    if photon.memory_pooling == "latent":  # chunkers, with the encoder state's projection and gate
        widths = (photon.span(at) * shape.kv // photon.memory_latent_parts for at in photon.source_levels.values())
        total += sum((width + hidden + 1) * shape.kv for width in widths)
    return total + (0 if photon.conditioning == "memory" else hidden)


def photon_parameters(photon: Any) -> int:
    """Parameters of a PHOTON model; a tied head counts once."""
    shape = Shape.of(photon.base_config)
    return shape.shared + photon.num_layers * shape.layer + new_parameters(photon)


def lora_parameters(photon: Any, rank: int, target_modules: Iterable[str] = LINEARS) -> int:
    """Parameters of rank-`rank` adapters on the named linear layers of all stacks (``lm_head`` counts if named)."""
    shape = Shape.of(photon.base_config)
    targets = set(target_modules)
    per_layer = sum(sum(sizes) for name, sizes in shape.linears.items() if name in targets)
    head = shape.vocab + shape.hidden if "lm_head" in targets else 0
    return rank * (photon.num_layers * per_layer + head)


def trainable_parameters(photon: Any, rank: int, target_modules: Iterable[str] = LINEARS) -> int:
    """Parameters that fine-tuning changes: adapters and new modules, or everything at rank 0."""
    if rank == 0:
        return photon_parameters(photon)
    return lora_parameters(photon, rank, target_modules) + new_parameters(photon)


# --- caches ---


@dataclass(frozen=True)
class CacheBytes:
    """Bytes that decoding keeps for one sequence.

    Attributes:
        growing: Keys and values of what grows with the text.
        constant: Keys and values of what is bounded.
        buffers: Open chunks and slots in force.
    """

    growing: int
    constant: int
    buffers: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.growing + self.constant + self.buffers


def dense_cache_bytes(config: Any, tokens: int, dtype_bytes: int = 2) -> int:
    """Bytes of the dense model's keys and values for one sequence of `tokens`; sliding layers keep their window."""
    shape = Shape.of(config)
    held = sum(tokens if window is None else min(tokens, window) for window in shape.windows)
    return held * shape.kv * dtype_bytes


def _ring(photon: Any) -> int:
    """Entries of a windowed layer of the token stream."""
    longest = photon.window + photon.window_alignment - 1
    first = photon.levels[0]
    slots = first["num_slots"] * math.ceil(longest / first["chunk_size"]) if photon.conditioning == "slots" else 0
    return photon.num_sinks + longest + slots


def _isolated(photon: Any) -> list[tuple[int, Mapping[str, Any]]]:
    """Levels (from 0) whose decoder reads isolated groups."""
    return [
        (index, level)
        for index, level in enumerate(photon.levels)
        if level["decoder_layers"] and (index > 0 or photon.layout == "block")
    ]


def cache_bytes(photon: Any, tokens: int, dtype_bytes: int = 2) -> CacheBytes:
    """Bytes of `PhotonCache` for one sequence of `tokens`, exactly.

    With S_l tokens under a level-l unit: an unbounded encoder layer of level l and a memory source on level l hold
    floor(tokens / S_l) keys and values, a full-attention layer one per token (and slot). Constant are the encoders with
    a window (that many units), the windowed layers of the stream (sinks and ring), and isolated decoders (R + C - 1).
    """
    shape = Shape.of(photon.base_config)
    growing = sum(tokens // photon.span(level) for level in photon.source_levels.values())
    constant = sum(
        level["decoder_layers"] * (level["num_slots"] + level["chunk_size"] - 1) for _, level in _isolated(photon)
    )
    buffers = 0
    for index, level in enumerate(photon.levels):
        units, window = tokens // photon.span(index + 1), level["encoder_window"]
        if window is None:
            growing += level["encoder_layers"] * units
        else:
            constant += level["encoder_layers"] * window
        buffers += level["chunk_size"] + (0 if photon.conditioning == "memory" else level["num_slots"])
    if photon.layout == "stream":
        first, full = photon.levels[0], len(photon.full_attention_layers)
        slots = first["num_slots"] * math.ceil(tokens / first["chunk_size"]) if photon.conditioning == "slots" else 0
        growing += full * (tokens + slots)
        constant += (first["decoder_layers"] - full) * _ring(photon)
    return CacheBytes(
        growing * shape.kv * dtype_bytes, constant * shape.kv * dtype_bytes, buffers * shape.hidden * dtype_bytes
    )


def growing_bytes_per_token(photon: Any, dtype_bytes: int = 2) -> float:
    """Slope of `cache_bytes` over the tokens."""
    span = photon.top_span
    grown = cache_bytes(photon, span, dtype_bytes).growing - cache_bytes(photon, 0, dtype_bytes).growing
    return grown / span


# --- work ---


def layer_positions(photon: Any) -> float:
    """Positions that go through a decoder layer per token; the dense model has its number of layers."""
    total = 0.0
    for index, level in enumerate(photon.levels):
        total += level["encoder_layers"] / photon.span(index + 1)
    for index, level in _isolated(photon):
        total += level["decoder_layers"] * (level["num_slots"] + level["chunk_size"] - 1) / photon.span(index + 1)
    if photon.layout == "stream":
        first = photon.levels[0]
        slots = first["num_slots"] / first["chunk_size"] if photon.conditioning == "slots" else 0.0
        total += first["decoder_layers"] * (1 + slots)
    return total


def widest_positions(photon: Any) -> float:
    """Positions per token of the stack that has the most."""
    widest = max(1 / photon.span(index + 1) for index in range(len(photon.levels)))
    for index, level in _isolated(photon):
        widest = max(widest, (level["num_slots"] + level["chunk_size"] - 1) / photon.span(index + 1))
    if photon.layout == "stream":
        first = photon.levels[0]
        slots = first["num_slots"] / first["chunk_size"] if photon.conditioning == "slots" else 0.0
        widest = max(widest, 1 + slots)
    return widest


def dense_flops(config: Any, context: int) -> float:
    """Forward FLOPs of the token after `context` tokens: 2 per weight, 4 per key seen and query dimension."""
    shape = Shape.of(config)
    keys = sum(context if window is None else min(context, window) for window in shape.windows)
    weights = shape.layers * shape.layer_matrices + shape.vocab * shape.hidden
    return 2.0 * weights + 4.0 * keys * shape.heads * shape.head_dim


def photon_flops(photon: Any, context: int) -> float:
    """Forward FLOPs of the token after `context` tokens, the work at unit rate spread over the tokens of a unit."""
    shape = Shape.of(photon.base_config)
    weights = layer_positions(photon) * shape.layer_matrices + shape.vocab * shape.hidden
    keys = 0.0
    for index, level in enumerate(photon.levels):
        span = photon.span(index + 1)
        weights += level["chunk_size"] * shape.hidden**2 / span
        if photon.conditioning != "memory":
            weights += level["num_slots"] * shape.hidden**2 / span
        seen = context // span if level["encoder_window"] is None else min(context // span, level["encoder_window"])
        keys += level["encoder_layers"] * seen / span
    for index, level in _isolated(photon):
        group = level["num_slots"] + level["chunk_size"] - 1
        keys += level["decoder_layers"] * group * (group + 1) / 2 / photon.span(index + 1)
    latent = photon.memory_pooling == "latent"
    width = shape.kv / photon.memory_latent_parts if latent else 0.0  # of what a folded query meets
    for level in photon.source_levels.values():
        weights += shape.hidden * shape.kv / photon.span(level)
        weights += shape.kv * width  # each part's span * width numbers to width, once per unit
    for level in photon.memory_levels:
        span = photon.span(level)
        weights += shape.kv * shape.head_dim if photon.memory_pooling == "linear" else 0
        # A latent's converter is folded into the queries, which then meet latents, or half of each.
        weights += 2 * span * width * shape.heads * shape.head_dim
        units = max(0, context - photon.window) // span
        keys += units * (span * width / shape.head_dim if latent else 1)
    if photon.layout == "stream":
        first, full = photon.levels[0], len(photon.full_attention_layers)
        per_token = 1 + (first["num_slots"] / first["chunk_size"] if photon.conditioning == "slots" else 0.0)
        near = (first["decoder_layers"] - full) * min(context, _ring(photon))
        keys += per_token * (near + full * per_token * context)
    return 2.0 * weights + 4.0 * keys * shape.heads * shape.head_dim
