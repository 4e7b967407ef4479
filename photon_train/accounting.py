"""Parameters, FLOPs, cache bytes and training memory in closed form, before any weight is loaded.

A *dense configuration* is any object or dict with the keys of a Llama-like ``config.json``; a *PHOTON configuration*
any object with the attributes of `PhotonConfig`. One element of a cache counts for one head dimension of one head.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
TARGETS = (*ATTENTION, "gate_proj", "up_proj", "down_proj")


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
        biased |= {"q_proj", "k_proj", "v_proj"} if model_type == "qwen2" else set()
        biased |= set(TARGETS[4:]) if _get(config, "mlp_bias", False) else set()
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
            total += photon.span(level) * shape.kv * (shape.kv + 1)
            continue
        total += 2 * shape.kv_heads * (photon.span(level) + 1) + 2 * hidden * keys
        if photon.memory_pooling == "linear":
            total += 2 * shape.kv_heads * photon.span(level) * shape.head_dim**2
    if photon.memory_pooling == "latent":  # chunkers, with the encoder state's projection and gate
        total += sum((photon.span(at) * shape.kv + hidden + 1) * shape.kv for at in photon.source_levels.values())
    return total + (0 if photon.conditioning == "memory" else hidden)


def photon_parameters(photon: Any) -> int:
    """Parameters of a PHOTON model; a tied head counts once."""
    shape = Shape.of(photon.base_config)
    return shape.shared + photon.num_layers * shape.layer + new_parameters(photon)


def lora_parameters(photon: Any, rank: int, target_modules: Iterable[str] = TARGETS) -> int:
    """Parameters of rank-`rank` adapters on the named linear layers of all stacks (``lm_head`` counts if named)."""
    shape = Shape.of(photon.base_config)
    targets = set(target_modules)
    per_layer = sum(sum(sizes) for name, sizes in shape.linears.items() if name in targets)
    head = shape.vocab + shape.hidden if "lm_head" in targets else 0
    return rank * (photon.num_layers * per_layer + head)


def trainable_parameters(photon: Any, rank: int, target_modules: Iterable[str] = TARGETS) -> int:
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
    for level in photon.source_levels.values():
        weights += shape.hidden * shape.kv / photon.span(level)
        weights += shape.kv * shape.kv if latent else 0  # span * kv numbers to kv, once per unit
    for level in photon.memory_levels:
        weights += shape.kv * shape.head_dim if photon.memory_pooling == "linear" else 0
        units = max(0, context - photon.window) // photon.span(level)
        keys += units * (photon.span(level) if latent else 1)
        weights += units * photon.span(level) * shape.kv**2 if latent else 0  # unpacked where they are read
    if photon.layout == "stream":
        first, full = photon.levels[0], len(photon.full_attention_layers)
        per_token = 1 + (first["num_slots"] / first["chunk_size"] if photon.conditioning == "slots" else 0.0)
        near = (first["decoder_layers"] - full) * min(context, _ring(photon))
        keys += per_token * (near + full * per_token * context)
    return 2.0 * weights + 4.0 * keys * shape.heads * shape.head_dim


# --- training memory ---


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes per process.

    Attributes:
        weights: Parameters on the device.
        gradients: Gradients of what is trained.
        optimizer: AdamW's two moments, and fp32 master weights under ZeRO with 16-bit weights.
        activations: What the backward pass keeps, and the logits (an estimate).
        host: What offloading keeps in main memory instead.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    host: int

    @property
    def device(self) -> int:
        """Bytes on the device."""
        return self.weights + self.gradients + self.optimizer + self.activations


def activation_bytes(photon: Any, tokens: int, dtype_bytes: int = 2, gradient_checkpointing: bool = False) -> int:
    """Estimate of the activations of `tokens` tokens in one forward pass.

    Per layer and position, what autograd keeps of a Llama layer: 4 hidden states (the inputs of norms and linears), 3
    queries and 3 keys and values (before and after rotation, and gathered into blocks), 4 inner states of the MLP. With
    checkpointing, the layer's input, and one layer in full. The logits count with their fp32 copy and its gradient.
    """
    shape = Shape.of(photon.base_config)
    inner, queries = shape.linears["up_proj"][0], shape.linears["q_proj"][0]
    per_position = 4 * shape.hidden + 3 * queries + 3 * shape.kv + 4 * inner
    positions = tokens * layer_positions(photon)
    kept = positions * shape.hidden + tokens * per_position if gradient_checkpointing else positions * per_position
    return int(kept * dtype_bytes + tokens * shape.vocab * (dtype_bytes + 8))


def training_memory(
    photon: Any,
    tokens: int,
    rank: int = 16,
    target_modules: Iterable[str] = TARGETS,
    dtype_bytes: int = 2,
    zero_stage: int = 0,
    num_processes: int = 1,
    offload: bool = False,
    gradient_checkpointing: bool = False,
) -> TrainingMemory:
    """Memory of one training process.

    Args:
        photon: PHOTON configuration.
        tokens: Tokens of one micro-step (batch size x sequence length).
        rank: LoRA rank; 0 trains everything.
        target_modules: Linear layers with adapters.
        dtype_bytes: Bytes of one weight in training.
        zero_stage: 0 (no sharding), 1 (optimiser states), 2 (and gradients), 3 (and weights).
        num_processes: Processes that share the shards.
        offload: Keep optimiser states (and with stage 3 the weights) in main memory.
        gradient_checkpointing: As in `activation_bytes`.

    Raises:
        ValueError: for another ZeRO stage.
    """
    if zero_stage not in (0, 1, 2, 3):
        raise ValueError(f"zero_stage={zero_stage} is not one of 0, 1, 2, 3")
    trained = trainable_parameters(photon, rank, target_modules)
    weights = photon_parameters(photon)
    if rank:  # peft trains copies of the new modules and keeps the originals
        weights += trained
    master = 4 if zero_stage and dtype_bytes < 4 else 0
    moments = 8 if zero_stage else 2 * dtype_bytes
    parts = {
        "weights": weights * dtype_bytes // (num_processes if zero_stage == 3 else 1),
        "gradients": trained * dtype_bytes // (num_processes if zero_stage >= 2 else 1),
        "optimizer": trained * (moments + master) // (num_processes if zero_stage else 1),
    }
    host = 0
    if offload and zero_stage >= 2:
        moved = ("optimizer", "weights") if zero_stage == 3 else ("optimizer",)
        host = sum(parts[name] for name in moved)
        parts.update(dict.fromkeys(moved, 0))
        if zero_stage == 3:  # the layer at work is gathered
            parts["weights"] = Shape.of(photon.base_config).layer * dtype_bytes
    return TrainingMemory(
        **parts, activations=activation_bytes(photon, tokens, dtype_bytes, gradient_checkpointing), host=host
    )


# --- all of it ---


@dataclass(frozen=True)
class Estimate:
    """What a conversion will cost; byte counts of caches are per sequence, of training per process.

    Attributes:
        dense_parameters, photon_parameters, new_parameters, trainable_parameters: Counts.
        dtype_bytes: Bytes of one weight and one cache element.
        context: Tokens at which the caches and FLOPs below are taken.
        dense_kv_per_token: Bytes that each token adds to the dense model's cache.
        photon_kv_per_token: Bytes that each token adds to PHOTON's.
        photon_kv_constant: Bytes of PHOTON's bounded caches and buffers.
        dense_kv, photon_kv: Bytes at `context`.
        dense_layer_positions, photon_layer_positions: Positions through a layer per token.
        dense_flops, photon_flops: Forward FLOPs per token at `context`.
        memory: Training memory per process.
        zero_stage, num_processes: What `memory` was computed for.
    """

    dense_parameters: int
    photon_parameters: int
    new_parameters: int
    trainable_parameters: int
    dtype_bytes: int
    context: int
    dense_kv_per_token: float
    photon_kv_per_token: float
    photon_kv_constant: int
    dense_kv: int
    photon_kv: int
    dense_layer_positions: float
    photon_layer_positions: float
    dense_flops: float
    photon_flops: float
    memory: TrainingMemory
    zero_stage: int
    num_processes: int

    @property
    def added_parameters(self) -> int:
        """Parameters beyond the dense model's: new modules and second copies of layers."""
        return self.photon_parameters - self.dense_parameters

    @property
    def kv_ratio(self) -> float:
        """Growing bytes per token, PHOTON over dense (0 if the dense cache does not grow)."""
        return self.photon_kv_per_token / self.dense_kv_per_token if self.dense_kv_per_token else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Every number, for JSON."""
        return asdict(self) | {
            "added_parameters": self.added_parameters,
            "kv_ratio": self.kv_ratio,
            "memory": asdict(self.memory) | {"device": self.memory.device},
        }

    def table(self) -> Table:
        """The numbers for a screen."""
        table = Table(title="Estimate")
        table.add_column("")
        for column in ("Dense", "PHOTON", "Ratio"):
            table.add_column(column, justify="right")

        def compare(label: str, dense: float, photon: float, show: Any) -> None:
            table.add_row(label, show(dense), show(photon), f"{photon / dense:.1%}" if dense else "")

        def single(label: str, value: str) -> None:
            table.add_row(label, "", value, "")

        at = f"at {self.context:,} tokens"
        compare("Parameters", self.dense_parameters, self.photon_parameters, "{:,}".format)
        single("  added", f"{self.added_parameters:,}")
        single("  trainable", f"{self.trainable_parameters:,}")
        compare("Cache per token", self.dense_kv_per_token, self.photon_kv_per_token, format_bytes)
        single("Cache, constant part", format_bytes(self.photon_kv_constant))
        compare(f"Cache {at}", self.dense_kv, self.photon_kv, format_bytes)
        compare("Layer positions per token", self.dense_layer_positions, self.photon_layer_positions, "{:.2f}".format)
        compare(f"FLOPs per token {at}", self.dense_flops, self.photon_flops, "{:.3g}".format)
        processes = (
            f"{self.num_processes} process{'es' if self.num_processes > 1 else ''}, ZeRO stage {self.zero_stage}"
        )
        single(f"Training memory per process ({processes})", format_bytes(self.memory.device))
        for part in ("weights", "gradients", "optimizer", "activations"):
            single(f"  {part}", format_bytes(getattr(self.memory, part)))
        if self.memory.host:
            single("  in main memory", format_bytes(self.memory.host))
        return table


def format_bytes(count: float) -> str:
    """``1536`` -> ``1.50 KiB``."""
    power = 0
    while count >= 1024 and power < 4:
        count, power = count / 1024, power + 1
    return f"{count:.2f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}" if power else f"{count:.0f} B"


def estimate(
    dense: Any,
    photon: Any,
    seq_len: int,
    batch_size: int = 1,
    rank: int = 16,
    target_modules: Sequence[str] = TARGETS,
    dtype_bytes: int = 2,
    zero_stage: int = 0,
    num_processes: int = 1,
    offload: bool = False,
    gradient_checkpointing: bool = False,
) -> Estimate:
    """All numbers of a conversion and its fine-tuning.

    Args:
        dense: Dense configuration.
        photon: PHOTON configuration.
        seq_len: Tokens per training sequence; caches and FLOPs are given at this length.
        batch_size: Sequences per process and micro-step.
        rank, target_modules, zero_stage, num_processes, offload, gradient_checkpointing: See `training_memory`.
        dtype_bytes: Bytes of one weight and one cache element.

    Raises:
        ValueError: as `training_memory`.
    """
    shape = Shape.of(dense)
    at_context = cache_bytes(photon, seq_len, dtype_bytes)
    return Estimate(
        dense_parameters=dense_parameters(dense),
        photon_parameters=photon_parameters(photon),
        new_parameters=new_parameters(photon),
        trainable_parameters=trainable_parameters(photon, rank, target_modules),
        dtype_bytes=dtype_bytes,
        context=seq_len,
        dense_kv_per_token=sum(window is None for window in shape.windows) * shape.kv * dtype_bytes,
        photon_kv_per_token=growing_bytes_per_token(photon, dtype_bytes),
        photon_kv_constant=at_context.constant + at_context.buffers,
        dense_kv=dense_cache_bytes(dense, seq_len, dtype_bytes),
        photon_kv=at_context.total,
        dense_layer_positions=shape.layers,
        photon_layer_positions=layer_positions(photon),
        dense_flops=dense_flops(dense, seq_len),
        photon_flops=photon_flops(photon, seq_len),
        memory=training_memory(
            photon,
            tokens=batch_size * seq_len,
            rank=rank,
            target_modules=target_modules,
            dtype_bytes=dtype_bytes,
            zero_stage=zero_stage,
            num_processes=num_processes,
            offload=offload,
            gradient_checkpointing=gradient_checkpointing,
        ),
        zero_stage=zero_stage,
        num_processes=num_processes,
    )
