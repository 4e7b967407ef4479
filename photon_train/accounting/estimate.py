"""All numbers of a conversion and its fine-tuning, for a screen and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from photon_train.accounting.memory import TrainingMemory, training_memory
from photon_train.accounting.model import (
    TARGETS,
    Shape,
    cache_bytes,
    dense_cache_bytes,
    dense_flops,
    dense_parameters,
    growing_bytes_per_token,
    layer_positions,
    new_parameters,
    photon_flops,
    photon_parameters,
    trainable_parameters,
)


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
