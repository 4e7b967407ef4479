"""Memory of a training process in closed form: the most that tensors take, as `tools/measure_memory.py` measures it.

What counts is what torch's allocators are asked for. The CUDA context (about half a GiB), libraries' workspaces and
fragmentation come on top.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from photon_train.accounting.model import costs_of, photon_parameters, trainable_parameters
from photon_train.linears import EXPERTS, FUSED

ZERO_STAGES = (0, 1, 2, 3)
# Elements of the logits that a loss takes at a time (`photon_train.training.heads`).
LOGIT_CHUNK = 2**24
# Bytes per element of a chunk's logits in the backward pass: log-probabilities, their gradient and the logits', fp32.
_CROSS_ENTROPY, _DISTILLATION = 12, 32
# DeepSpeed's defaults, in elements: gathered weights are kept if they are used again within `max_reuse_distance`, and
# half of that lies before the end of the forward pass; `prefetch_bucket_size`; smaller parameters are kept whole.
_KEPT_GATHERED, _PREFETCHED, _PERSISTENT = 5 * 10**8, 5 * 10**7, 10**5
# Bytes per weight in 4 bits: its code, a factor of one byte per 64 weights, and of these an fp32 one per 256.
_BLOCK = 64
_IN_4_BITS = 1 / 2 + 1 / _BLOCK + 4 / (_BLOCK * 256)


@dataclass(frozen=True)
class TrainingSetup:
    """What a training's memory depends on beside the model.

    Attributes:
        seq_len: Tokens per sequence.
        batch_size: Sequences per process and micro-step.
        rank: LoRA rank; 0 trains everything.
        target_modules: Linear layers with adapters, and ``experts``; None: all linear layers.
        weight_bytes: Bytes of one weight as it is loaded.
        precision: ``bf16``, ``fp16`` or ``no``: autocast, or under ZeRO the type of all weights.
        zero_stage: 0 (no sharding), 1 (optimiser states), 2 (and gradients), 3 (and weights).
        num_processes: Processes that share the shards.
        offload: Keep optimiser states (and with stage 3 the weights) in main memory.
        gradient_checkpointing: Recompute the layers in the backward pass.
        accumulates: Whether gradients of several micro-steps are added up.
        distill: Whether the dense model's logits are a target.
        distill_hidden: Whether its last hidden states are.
        base_bits: Bits of a frozen linear layer's weight; 16 stands for its own type.

    Raises:
        ValueError: for another ZeRO stage or precision.
    """

    seq_len: int
    batch_size: int = 1
    rank: int = 16
    target_modules: tuple[str, ...] | None = None
    weight_bytes: int = 2
    precision: str = "bf16"
    zero_stage: int = 0
    num_processes: int = 1
    offload: bool = False
    gradient_checkpointing: bool = False
    accumulates: bool = False
    distill: bool = False
    distill_hidden: bool = False
    base_bits: int = 16

    def __post_init__(self) -> None:
        if self.zero_stage not in ZERO_STAGES:
            raise ValueError(f"zero_stage={self.zero_stage} is not one of 0, 1, 2, 3")
        if self.precision not in ("no", "bf16", "fp16"):
            raise ValueError(f"precision={self.precision!r} is not one of no, bf16, fp16")

    @property
    def tokens(self) -> int:
        """Tokens of one micro-step."""
        return self.batch_size * self.seq_len

    @property
    def autocast(self) -> bool:
        """Whether weights keep their type and matrix products are computed in another."""
        return self.precision != "no" and not self.zero_stage

    @property
    def frozen_bytes(self) -> int:
        """Bytes of one frozen weight on the device; without mixed precision all are trained in fp32."""
        if self.precision == "no":
            return max(4, self.weight_bytes)
        return 2 if self.zero_stage else self.weight_bytes

    @property
    def trained_bytes(self) -> int:
        """Bytes of one trained weight on the device: fp32 unless ZeRO holds masters; peft makes 16-bit adapters so."""
        if self.zero_stage or (self.precision == "no" and not self.rank):
            return self.frozen_bytes
        return 4

    @property
    def compute_bytes(self) -> int:
        """Bytes of what a linear layer puts out."""
        return self.frozen_bytes if self.precision == "no" else 2

    @property
    def stream_bytes(self) -> int:
        """Bytes of a residual stream's element: it has the embedding's type, which is fp32 where that is trained."""
        return 4 if self.autocast and not self.rank else self.frozen_bytes


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes per process.

    Attributes:
        weights: Parameters on the device.
        gradients: Gradients of what is trained.
        optimizer: AdamW's two moments, and fp32 master weights under ZeRO.
        buffers: What DeepSpeed (or DDP) holds beside them: buckets, gathered weights, shards of gradients.
        activations: What the backward pass keeps and works on when it begins.
        step: What the optimiser step works on, gradients left aside.
        accumulates: Whether gradients are in memory when the backward pass begins.
        host: What offloading keeps in main memory instead.
    """

    weights: int
    gradients: int
    optimizer: int
    buffers: int
    activations: int
    step: int
    accumulates: bool
    host: int

    @property
    def device(self) -> int:
        """Most bytes on the device: at the beginning of a backward pass, or in the optimiser step."""
        backward = self.activations + (self.gradients if self.accumulates else 0)
        return self.weights + self.optimizer + self.buffers + max(backward, self.gradients + self.step)


def _targets(costs: Any, setup: TrainingSetup) -> set[str]:
    """Linear layers that are trained or have adapters, and `EXPERTS` where these are named."""
    named = setup.target_modules if setup.rank else None
    return set(costs.shape.linear_names if named is None else named)


def _layer_bytes(costs: Any, setup: TrainingSetup) -> tuple[float, float]:
    """Bytes that autograd keeps of a decoder layer per position: in the mean over the layers, and at the most.

    The inputs of the norms in fp32; what the projections' adapters read; queries, keys and values after rotation, the
    attention's output and log-sum-exp; three inner states of the MLP and their product. Without autocast adapters share
    one input; under autocast each keeps a cast of its own. What a recurrent layer has in place of attention keeps what
    its linear maps put out, once more after the convolution, what the last of them reads, and its recurrence.
    """
    shape, targets, stream = costs.shape, _targets(costs, setup), setup.stream_bytes
    inner, queries, keys = shape.inner, shape.linears["q_proj"][0], shape.kv // 2
    gate_up, down = {shape.names[name] for name in FUSED["gate_up_proj"]}, shape.names["down_proj"]
    compute = setup.compute_bytes

    def inputs(names: set[str]) -> int:
        count = len(targets & names)
        if setup.autocast:
            return count * shape.hidden * compute
        return min(count, 1) * shape.hidden * stream

    def adapters(names: Iterable[str]) -> int:
        return compute * setup.rank * len(targets & set(names))

    kept = 2 * 4 * shape.hidden + inputs(gate_up)
    if not setup.rank:  # trained norms keep what they scale
        kept += 2 * stream * shape.hidden
    kept += compute * (3 * inner + (down in targets) * inner) + adapters({*shape.linears} - {*shape.attention})
    if shape.mixture is not None:
        # Each expert's share of a token: its input, and its output before and after the router's weight.
        kept += 3 * shape.mixture.active * shape.hidden * compute
        kept += (not setup.rank or EXPERTS in targets) * inner * compute
    attention = inputs(set(FUSED["qkv_proj"])) + 4 * (queries + keys) * shape.head_norms
    attention += compute * (2 * queries + 2 * keys) + 4 * shape.heads + adapters(shape.attention)
    if shape.mixer is None:
        return kept + attention, kept + attention
    *first, (_, read) = shape.mixer.linears.values()
    mixer = inputs({*list(shape.mixer.linears)[:-1]}) + compute * (2 * sum(outputs for outputs, _ in first) + read)
    mixer += adapters(shape.mixer.linears) + 4 * shape.mixer.kept
    share = len(shape.recurrent) / shape.layers
    return kept + share * mixer + (1 - share) * attention, kept + max(mixer, attention)


def _adapted_experts(costs: Any, setup: TrainingSetup) -> int:
    """Bytes of the experts with their adapters' change, which exist while a layer runs and for its backward pass."""
    mixture = costs.shape.mixture
    if not setup.rank or mixture is None or EXPERTS not in _targets(costs, setup):
        return 0
    return mixture.count * mixture.expert * setup.frozen_bytes


def _cast_weights(photon: Any, costs: Any, setup: TrainingSetup) -> tuple[int, int]:
    """Bytes of fp32 weights' 16-bit casts, kept until the backward pass: of all layers, and of everything else."""
    if not setup.autocast:
        return 0, 0
    shape, trained = costs.shape, trainable_parameters(photon, setup.rank, setup.target_modules)
    if setup.weight_bytes < 4 and setup.rank:
        return 0, 2 * trained
    layers = costs.num_layers * shape.layer_matrices + shape.all_matrices - shape.layers * shape.active_matrices
    layers *= 2 if setup.base_bits == 16 else 0  # else cast for each use
    return layers, 2 * (shape.vocab * shape.hidden + trained * bool(setup.rank))


def _quantised(costs: Any, setup: TrainingSetup) -> int:
    """Weights that are held in 4 bits: of layers whose rows are whole blocks."""
    if setup.base_bits == 16:
        return 0
    shape = costs.shape

    def whole(linears: Mapping[str, tuple[int, int]]) -> int:
        return sum(outputs * inputs for outputs, inputs in linears.values() if not inputs % _BLOCK)

    other = 0 if shape.mixer is None else whole(shape.mixer.linears) - whole(shape.attention)
    return costs.num_layers * whole(shape.linears) + len(shape.recurrent) * other


def _dequantised(costs: Any, setup: TrainingSetup) -> int:
    """Bytes of the largest 4-bit matrix as it is multiplied with: in its own type, and cast where that is another."""
    if setup.base_bits == 16:
        return 0
    mixer = costs.shape.mixer.linears if costs.shape.mixer else {}
    largest = max(outputs * inputs for outputs, inputs in (*costs.shape.modules.values(), *mixer.values()))
    cast = setup.compute_bytes if setup.compute_bytes != setup.weight_bytes else 0
    return largest * (setup.weight_bytes + cast)


def activation_bytes(photon: Any, setup: TrainingSetup) -> int:
    """What forward and backward of a micro-step hold at the most, weights and gradients left aside.

    That is when the backward pass begins. Kept are all layers, or with checkpointing their inputs; beside them stands
    the larger of the vocabulary's loss over one chunk and of the topmost layer's backward pass (recomputed first).
    """
    costs, tokens = costs_of(photon), setup.tokens
    shape, stream, compute = costs.shape, setup.stream_bytes, setup.compute_bytes
    hidden, inner = shape.hidden, shape.inner
    # What the first layers read, the final norm's fp32 input and its output.
    kept = tokens * hidden * (costs.inputs * stream + 4 + (compute if setup.autocast else 0))
    cast_layers, cast_others = _cast_weights(photon, costs, setup)
    dequantised = _dequantised(costs, setup)
    head = min(tokens * shape.vocab, LOGIT_CHUNK) * (_DISTILLATION if setup.distill else _CROSS_ENTROPY)
    if setup.distill or setup.distill_hidden:  # the dense model's states, and the student's difference from them
        kept += tokens * hidden * stream * (2 if setup.distill_hidden else 1)
    positions, (layer, largest) = tokens * costs.layer_positions, _layer_bytes(costs, setup)
    widest = tokens * costs.widest
    backward = widest * (3 * inner * compute + 2 * hidden * stream) + dequantised
    experts = _adapted_experts(costs, setup)
    memory, widest_memory = (tokens * compute * states for states in costs.memory_states)
    if setup.gradient_checkpointing:
        kept += positions * hidden * stream
        backward += widest_memory
        shared = 4 * hidden if stream == 4 else 0  # the layer's input is the first norm's
        backward += widest * (largest - shared) + cast_layers // costs.num_layers + experts
    else:
        kept += positions * layer + memory + cast_layers + costs.num_layers * experts
    return int(kept + cast_others + max(head, backward))


def training_memory(photon: Any, setup: TrainingSetup) -> TrainingMemory:
    """Memory of one training process."""
    trained = trainable_parameters(photon, setup.rank, setup.target_modules)
    total = photon_parameters(photon) + (trained if setup.rank else 0)
    frozen = total - trained
    stage, processes = setup.zero_stage, setup.num_processes
    size, trained_size = setup.frozen_bytes, setup.trained_bytes
    saved = int(_quantised(costs_of(photon), setup) * (size - _IN_4_BITS))
    shard = -(-trained // processes)
    host = step = buffers = 0
    if stage == 0:
        weights, optimizer = frozen * size - saved + trained * trained_size, 2 * trained * trained_size
        gradients = step = trained * trained_size  # AdamW's denominators, of all parameters at once on a GPU
        buffers = gradients if processes > 1 else 0  # DDP's buckets
    else:
        has_masters = size < 4 or stage < 3
        optimizer = shard * (12 if has_masters else 8)
        gradients, step = (shard if stage >= 2 else trained) * size, 2 * shard * 4
        buffers = costs_of(photon).shape.hidden ** 2 * size  # the reduce bucket
        weights = total * size - saved
        if stage == 3:
            weights = -(-total // processes) * size
            buffers += min(total, _KEPT_GATHERED + _PREFETCHED) * size + gradients
    if setup.offload and stage >= 2:
        host, optimizer, step = optimizer + 4 * shard, 0, 0
        if stage == 3:
            host, weights = host + weights, 0
    return TrainingMemory(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        buffers=buffers,
        activations=activation_bytes(photon, setup),
        step=step,
        accumulates=setup.accumulates,
        host=host,
    )
