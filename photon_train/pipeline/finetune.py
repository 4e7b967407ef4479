"""Fine-tuning of a model that is PHOTON already: what a conversion run left in `converted/` or `export/`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from photon_train.accounting import costs_of
from photon_train.checkpoints import read_config
from photon_train.config import PhotonSettings, RunConfig
from photon_train.conversion.presets import target_of
from photon_train.errors import PhotonError
from photon_train.manifest import FILE_NAME, verify_manifest
from photon_train.pipeline.base import TrainingRun
from photon_train.pipeline.console import make_console
from photon_train.pipeline.devices import weight_bytes
from photon_train.pipeline.prepare import document_alignment, estimate_training, load_text, load_tokenizer
from photon_train.pipeline.stages import Stages
from photon_train.training.accelerator import make_accelerator
from photon_train.training.checkpoint import text_hashes


def run_finetuning(config: RunConfig) -> None:
    """Carry out the run, or with `dry_run` estimate it. Every process of `accelerate launch` calls it.

    Raises:
        PhotonError: for bad input, before work starts where it can be known.
    """
    rank, num_processes = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if config.model is None:
        raise PhotonError("model is not set: name the converted/ or export/ directory of a run")
    if config.photon != PhotonSettings():
        raise PhotonError(
            "photon.* is set, but what a converted model is made of is fixed: leave these settings out, or convert "
            "the dense model anew with `photon-train convert`"
        )
    photon = read_config(config.model)
    document_alignment(photon, config)
    numbers = estimate_training(costs_of(photon).dense, photon, config, num_processes)
    if config.dry_run:
        if rank == 0:
            make_console().print(numbers.table())
        return
    with Stages(config, rank == 0, num_processes) as stages:
        run = _FinetuningRun(config, make_accelerator(config, config.output), stages)
        run.start, run.dtype, run.numbers = Path(config.model), config.export.dtype, numbers
        run.carry_out(photon)


class _FinetuningRun(TrainingRun):
    """The stages of one run, in order."""

    def carry_out(self, photon: PretrainedConfig) -> None:
        if self.is_main and (self.start / FILE_NAME).is_file():
            verify_manifest(self.start)
        self.preset = target_of(photon).preset(photon)
        tokenizer = load_tokenizer(self.start, photon.vocab_size, self.config.dataset)
        if self.config.dataset.stream:
            self.begin()  # the tokens are written into the output
        align, processes = document_alignment(photon, self.config), self.accelerator.num_processes
        text = load_text(self.config, tokenizer, align, processes, self.is_main, self.main_first)
        self.say(f"Data: {text}.")
        self.stages.bind_text(text_hashes(text.train, text.held_out))
        self.check_disk({self.exported: weight_bytes(self.start)})
        self.begin()
        self.finish(text)

    def describe(self, photon: dict[str, Any]) -> dict[str, Any]:
        return {"model": self.config.model, "preset": self.preset, "start_ce": photon["initial_ce"]}

    def paths(self) -> dict[str, str]:
        return {"model before": str(self.start)}
