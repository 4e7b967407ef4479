"""Layers chosen by a probe of the dense model on the run's own text, instead of by the preset's rule."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from photon_train.config import RunConfig
from photon_train.conversion.calibrate import calibration_batches
from photon_train.conversion.graft import configure, memory_candidates
from photon_train.conversion.probe import probe_layers
from photon_train.data.packing import PackedDataset
from photon_train.data.progress import progress_bar
from photon_train.pipeline.console import make_console
from photon_train.pipeline.devices import roomy_device, weight_bytes

_SEQUENCES = 16


def wants_probe(config: RunConfig, planned: PretrainedConfig) -> bool:
    """Whether a probe is to choose the memory cells."""
    return False


def with_layers(config: RunConfig, layers: list[int]) -> RunConfig:
    """`config` with these memory layers."""
    photon = dataclasses.replace(config.photon, memory_layers=layers, choose_layers="preset", num_memory_layers=None)
    return dataclasses.replace(config, photon=photon)


def choose_layers(config: RunConfig, directory: Path, text: PackedDataset, device: torch.device) -> list[int]:
    """The memory layers of a conversion: `photon.num_memory_layers`, where far attention is missed most.

    Where the dense model does not fit the GPU whole, a probe that nobody asked for is left out: a CPU takes hours.

    Args:
        config: The run.
        directory: The dense checkpoint.
        text: Training sequences; the first 16 are read.
        device: Where the dense model runs.

    Raises:
        PhotonError: for more layers than there are, or sequences that are not longer than the window.
    """
    dense = AutoConfig.from_pretrained(directory)
    planned, among = configure(dense, config), memory_candidates(dense, config.photon)
    roomy = roomy_device(device, weight_bytes(directory))
    if roomy != device and config.photon.choose_layers is None:
        make_console(stderr=True).print(
            f"The dense model does not fit the GPU whole: the memory layers are the preset's, {planned.memory_layers}, "
            "not probed (--photon.choose_layers probe does it on the CPU)."
        )
        return planned.memory_layers
    model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto", attn_implementation="photon").to(roomy)
    with progress_bar(True, "of {task.total} passes") as bar:
        task = bar.add_task("probing layers", total=None)
        probe = probe_layers(
            model,
            calibration_batches(text, _SEQUENCES),
            planned.window,
            planned.num_sinks,
            on_pass=lambda done, total: bar.update(task, completed=done, total=total),
        )
    make_console(stderr=True).print(probe.table())
    return probe.best_layers(len(planned.memory_layers), among)
