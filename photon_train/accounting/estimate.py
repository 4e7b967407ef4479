"""All numbers of a conversion and its fine-tuning, for a screen and as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from photon_train.accounting.fit import Fit, find_fit, format_bytes
from photon_train.accounting.memory import TrainingMemory, TrainingSetup, training_memory
from photon_train.accounting.model import (
    cache_bytes,
    costs_of,
    growing_bytes_per_token,
    layer_positions,
    new_parameters,
    photon_flops,
    photon_parameters,
    trainable_parameters,
)
from photon_train.accounting.shape import Shape, active_parameters, dense_cache_bytes, dense_flops, dense_parameters


@dataclass(frozen=True)
class Estimate:
    """What a conversion will cost; byte counts of caches are per sequence, of training per process.

    Attributes:
        dense_parameters, photon_parameters, new_parameters, trainable_parameters: Counts.
        dense_active, photon_active: Parameters that a token goes through; fewer where layers have experts.
        dtype_bytes: Bytes of one weight and one cache element.
        context: Tokens at which the caches and FLOPs below are taken.
        dense_kv_per_token: Bytes that each token adds to the dense model's cache.
        photon_kv_per_token: Bytes that each token adds to PHOTON's.
        photon_kv_constant: Bytes of PHOTON's bounded caches.
        dense_kv, photon_kv: Bytes at `context`.
        dense_layer_positions, photon_layer_positions: Positions through a layer per token.
        dense_flops, photon_flops: Forward FLOPs per token at `context`.
        conversion_bytes: What the conversion holds on one device while it fits new modules to text: weights and fit.
        memory: Training memory per process.
        setup: What `memory` was computed for.
        fit: Which accelerate configs fit a GPU; None where no GPU is known.
    """

    dense_parameters: int
    photon_parameters: int
    new_parameters: int
    trainable_parameters: int
    dense_active: int
    photon_active: int
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
    conversion_bytes: int
    memory: TrainingMemory
    setup: TrainingSetup
    fit: Fit | None

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
            "fit": None if self.fit is None else self.fit.to_dict(),
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
        if self.dense_active != self.dense_parameters:
            compare("  active", self.dense_active, self.photon_active, "{:,}".format)
        single("  added", f"{self.added_parameters:,}")
        single("  trainable", f"{self.trainable_parameters:,}")
        compare("Cache per token", self.dense_kv_per_token, self.photon_kv_per_token, format_bytes)
        single("Cache, constant part", format_bytes(self.photon_kv_constant))
        compare(f"Cache {at}", self.dense_kv, self.photon_kv, format_bytes)
        compare("Layer positions per token", self.dense_layer_positions, self.photon_layer_positions, "{:.2f}".format)
        compare(f"FLOPs per token {at}", self.dense_flops, self.photon_flops, "{:.3g}".format)
        single("Conversion's memory", format_bytes(self.conversion_bytes))
        count, stage = self.setup.num_processes, self.setup.zero_stage
        processes = f"{count} process{'es' if count > 1 else ''}, ZeRO stage {stage}, {self.setup.precision} precision"
        single(f"Training memory per process ({processes})", format_bytes(self.memory.device))
        for part in ("weights", "gradients", "optimizer", "buffers", "activations"):
            single(f"  {part}", format_bytes(getattr(self.memory, part)))
        if self.memory.host:
            single("  in main memory", format_bytes(self.memory.host))
        if self.fit is None:
            single("Fits a GPU", "unknown size: --train.gpu_memory")
        else:
            self.fit.add_rows(single)
        return table


def estimate(dense: Any, photon: Any, setup: TrainingSetup, gpu_bytes: int | None = None) -> Estimate:
    """All numbers of a conversion and its fine-tuning.

    Args:
        dense: Dense configuration.
        photon: PHOTON configuration.
        setup: The training; caches and FLOPs are given at its sequence length, cache elements as large as its weights.
        gpu_bytes: Memory of one GPU, to recommend an accelerate config for.
    """
    shape, seq_len, dtype_bytes = Shape.of(dense), setup.seq_len, setup.weight_bytes
    at_context = cache_bytes(photon, seq_len, dtype_bytes)
    in_dense, in_photon = dense_parameters(dense), photon_parameters(photon)
    return Estimate(
        dense_parameters=in_dense,
        photon_parameters=in_photon,
        new_parameters=new_parameters(photon),
        trainable_parameters=trainable_parameters(photon, setup.rank, setup.target_modules),
        dense_active=active_parameters(dense, in_dense),
        photon_active=active_parameters(dense, in_photon),
        dtype_bytes=dtype_bytes,
        context=seq_len,
        dense_kv_per_token=sum(window is None for window in shape.windows) * shape.kv * dtype_bytes,
        photon_kv_per_token=growing_bytes_per_token(photon, dtype_bytes),
        photon_kv_constant=at_context.constant,
        dense_kv=dense_cache_bytes(dense, seq_len, dtype_bytes),
        photon_kv=at_context.total,
        dense_layer_positions=shape.layers,
        photon_layer_positions=layer_positions(photon),
        dense_flops=dense_flops(dense, seq_len),
        photon_flops=photon_flops(photon, seq_len),
        conversion_bytes=in_photon * dtype_bytes + costs_of(photon).fit_bytes,
        memory=training_memory(photon, setup),
        setup=setup,
        fit=None if gpu_bytes is None else find_fit(photon, setup, gpu_bytes),
    )
