"""Memory of a training process in closed form."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from photon_train.accounting.model import TARGETS, Shape, layer_positions, photon_parameters, trainable_parameters


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
