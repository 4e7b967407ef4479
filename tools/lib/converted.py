"""Converted models for comparisons, in memory: no training, nothing left on the disk."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from photon_train.config import RunConfig
from photon_train.conversion.apply import convert
from photon_train.conversion.calibrate import calibrate_directory
from photon_train.conversion.presets import make_plan, photon_config
from photon_train.conversion.source import DenseCheckpoint


def converted(
    dense: Path, config: RunConfig, calibration: Sequence[torch.Tensor], device: str | torch.device = "cpu"
) -> PreTrainedModel:
    """What the recipe makes of a dense checkpoint before it trains.

    Args:
        config: The run's settings; `photon.memory_cells` is set where cells are to be chosen by a probe.
        calibration: Batches of token ids ``[B, T]`` that the new modules are fitted to.
        device: Where they are fitted; the model comes on the CPU.
    """
    checkpoint = DenseCheckpoint.open(str(dense))
    target = photon_config(checkpoint.config, config)
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch) / "converted"
        fit = partial(calibrate_directory, batches=calibration, device=device)
        convert(checkpoint, make_plan(checkpoint, target), target, directory, progress=False, on_written=fit)
        return AutoModelForCausalLM.from_pretrained(directory, dtype="auto")
