"""Layers chosen by a probe of the dense model on the run's own text, instead of by the preset's rule."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from photon_train.config import RunConfig
from photon_train.conversion.calibrate import calibration_batches
from photon_train.conversion.presets import photon_config
from photon_train.conversion.probe import probe_layers
from photon_train.data.packing import PackedDataset
from photon_train.data.progress import progress_bar
from photon_train.errors import PhotonError
from photon_train.models import PhotonConfig
from photon_train.pipeline.console import make_console
from photon_train.pipeline.devices import roomy_device, weight_bytes

_SEQUENCES = 16


def wants_probe(config: RunConfig, planned: PhotonConfig) -> bool:
    """Whether `photon.choose_layers` asks for a probe, or leaves the choice open and a probe can make it."""
    if config.photon.choose_layers is not None:
        return config.photon.choose_layers == "probe"
    can_choose = config.photon.memory_layers is None and config.preset == "graft" and bool(planned.memory_layers)
    return can_choose and config.train.seq_len > planned.window + 1


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
        PhotonError: for a plan without memory layers, more layers than there are, or sequences that are not longer
            than the window.
    """
    dense = AutoConfig.from_pretrained(directory)
    planned: PhotonConfig = photon_config(dense, config)
    if not planned.memory_layers or planned.num_token_layers != dense.num_hidden_layers:
        raise PhotonError("photon.choose_layers=probe needs preset graft with conditioning memory: drop it")
    count = config.photon.num_memory_layers or len(planned.memory_layers)
    among = set(range(planned.branch_layer, planned.num_token_layers)) - set(planned.full_attention_layers)
    if count > len(among):
        raise PhotonError(
            f"photon.num_memory_layers={count}: {len(among)} layers can have memory (those from photon.branch_layer on "
            "that are not in photon.full_attention_layers); lower it"
        )
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
    return probe.best_layers(count, sorted(among))
