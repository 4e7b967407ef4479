"""Which accelerate config a training fits a GPU with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from photon_train.accounting.memory import TrainingSetup, training_memory

# Of a GPU's memory: the estimate's tolerance (15%, see benchmarks/training/memory.json), in which the CUDA context, the
# libraries' workspaces and fragmentation must find room as well.
USABLE = 0.85
_MOST_GPUS = 64


def format_bytes(count: float) -> str:
    """``1536`` -> ``1.50 KiB``."""
    power = 0
    while count >= 1024 and power < 4:
        count, power = count / 1024, power + 1
    return f"{count:.2f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}" if power else f"{count:.0f} B"


@dataclass(frozen=True)
class Option:
    """One way to launch a training.

    Attributes:
        config: Name of a file of `accelerate_configs/`, without its ending.
        num_processes: GPUs.
        batch_size: Sequences per process and micro-step.
        gradient_checkpointing: Whether layers are recomputed.
        device_bytes: Estimated peak of a process.
        host_bytes: What a process keeps in main memory.
        fits: Whether the peak leaves the headroom free.
    """

    config: str
    num_processes: int
    batch_size: int
    gradient_checkpointing: bool
    device_bytes: int
    host_bytes: int
    fits: bool

    def command(self, setup: TrainingSetup) -> str:
        """The launcher's arguments, and those that differ from the run's; the configs' own count is 8 processes."""
        arguments = [f"--config_file accelerate_configs/{self.config}.yaml"]
        if self.config != "single_gpu":
            arguments.append(f"--num_processes {self.num_processes}")
        if self.gradient_checkpointing != setup.gradient_checkpointing:
            arguments.append("--train.gradient_checkpointing")
        if self.batch_size != setup.batch_size:
            arguments.append(f"--train.batch_size {self.batch_size}")
        return " ".join(arguments)


@dataclass(frozen=True)
class Fit:
    """What fits a GPU.

    Attributes:
        gpu_bytes: Memory of one GPU.
        options: The accelerate configs for the launch's processes, with the run's settings.
        recommended: The first that fits, in the order of speed: the run's settings with as little sharding as possible,
            then gradient checkpointing, then smaller batches, then offloading; else more GPUs. None: nothing fits.
        setup: The run's settings.
    """

    gpu_bytes: int
    options: tuple[Option, ...]
    recommended: Option | None
    setup: TrainingSetup

    def to_dict(self) -> dict[str, Any]:
        """Every number, for JSON."""
        recommended = self.recommended
        return {
            "gpu_bytes": self.gpu_bytes,
            "usable_bytes": int(USABLE * self.gpu_bytes),
            "options": [asdict(option) for option in self.options],
            "recommended": None
            if recommended is None
            else asdict(recommended) | {"arguments": recommended.command(self.setup)},
        }

    def add_rows(self, add: Callable[[str, str], None]) -> None:
        """Hand label and value of every line for a screen to `add`."""
        gpus = f"{self.setup.num_processes} GPU{'s' if self.setup.num_processes > 1 else ''}"
        add(f"Fits {gpus} of {format_bytes(self.gpu_bytes)}, {1 - USABLE:.0%} kept free", "")
        for option in self.options:
            verdict = "fits" if option.fits else "too large"
            checkpointing = " + gradient checkpointing" if option.gradient_checkpointing else ""
            add(f"  {option.config}{checkpointing}", f"{format_bytes(option.device_bytes)}, {verdict}")
        if self.recommended is None:
            add("Recommended", f"none fits up to {_MOST_GPUS} GPUs: lower train.seq_len or lora.rank")
        else:
            add("Recommended", self.recommended.command(self.setup))


def _configs(num_processes: int, base_bits: int) -> tuple[tuple[str, int, bool], ...]:
    """Name, ZeRO stage and offload of the configs for so many processes, the fastest first."""
    if num_processes == 1:
        known = ("single_gpu", 0, False), ("zero3_offload", 3, True)
    else:
        known = ("zero2", 2, False), ("zero3", 3, False), ("zero3_offload", 3, True)
    return tuple(config for config in known if config[1] < 3 or base_bits == 16)  # ZeRO-3 cannot divide 4-bit codes


def _option(photon: Any, setup: TrainingSetup, config: tuple[str, int, bool], gpu_bytes: int) -> Option:
    name, stage, offload = config
    setup = replace(setup, zero_stage=stage, offload=offload)
    memory = training_memory(photon, setup)
    return Option(
        name,
        setup.num_processes,
        setup.batch_size,
        setup.gradient_checkpointing,
        memory.device,
        memory.host,
        memory.device <= USABLE * gpu_bytes,
    )


def _by_speed(setup: TrainingSetup) -> Iterator[tuple[TrainingSetup, tuple[str, int, bool]]]:
    """Every way to launch, the fastest first; a smaller batch can be made up for by accumulation."""
    checkpointed = replace(setup, gradient_checkpointing=True)
    batches = [setup.batch_size]
    while batches[-1] > 1:
        batches.append(batches[-1] // 2)
    resident = [config for config in _configs(setup.num_processes, setup.base_bits) if not config[2]]
    offloaded = [config for config in _configs(setup.num_processes, setup.base_bits) if config[2]]
    if not setup.gradient_checkpointing:
        yield from ((setup, config) for config in resident)
    for configs in (resident, offloaded):
        for size in batches:
            yield from ((replace(checkpointed, batch_size=size), config) for config in configs)
    processes = max(2, 2 * setup.num_processes)
    while processes <= _MOST_GPUS:
        wider = replace(checkpointed, batch_size=1, num_processes=processes)
        yield from ((wider, config) for config in _configs(processes, setup.base_bits))
        processes *= 2


def find_fit(photon: Any, setup: TrainingSetup, gpu_bytes: int) -> Fit:
    """Judge the accelerate configs for a GPU of `gpu_bytes`; see `Fit`."""
    options = [
        _option(photon, replace(setup, gradient_checkpointing=checkpointing), config, gpu_bytes)
        for checkpointing in sorted({setup.gradient_checkpointing, True})
        for config in _configs(setup.num_processes, setup.base_bits)
    ]
    ways = (_option(photon, way, config, gpu_bytes) for way, config in _by_speed(setup))
    return Fit(gpu_bytes, tuple(options), next((option for option in ways if option.fits), None), setup)
