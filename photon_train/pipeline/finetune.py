"""Fine-tuning of a model that is PHOTON already: what a conversion run left in `converted/` or `export/`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from photon_train.config import PhotonSettings, RunConfig
from photon_train.errors import PhotonError
from photon_train.manifest import FILE_NAME, verify_manifest
from photon_train.models import PhotonConfig
from photon_train.pipeline.base import TrainingRun
from photon_train.pipeline.console import make_console
from photon_train.pipeline.prepare import estimate_training, load_text, load_tokenizer
from photon_train.pipeline.stages import Stages
from photon_train.training.accelerator import make_accelerator


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
            "photon.* is set, but the hierarchy of a converted model is fixed: leave these settings out, or convert "
            "the dense model anew with `photon-train convert`"
        )
    photon = _config_of(Path(config.model))
    numbers = estimate_training(photon.base_config, photon, config, num_processes)
    if config.dry_run:
        if rank == 0:
            make_console().print(numbers.table())
        return
    stages = Stages(config, rank == 0, num_processes)
    run = _FinetuningRun(config, make_accelerator(config, config.output), stages)
    run.start, run.dtype, run.numbers = Path(config.model), config.export.dtype, numbers
    run.carry_out(photon)


def _config_of(directory: Path) -> PhotonConfig:
    if not (directory / "config.json").is_file():
        raise PhotonError(f"{directory} holds no config.json: give the converted/ or export/ directory of a run")
    if PhotonConfig.get_config_dict(directory)[0].get("model_type") != PhotonConfig.model_type:
        raise PhotonError(f"{directory} is no PHOTON model: convert it with `photon-train convert`")
    try:
        return PhotonConfig.from_pretrained(directory)
    except ValueError as error:
        raise PhotonError(f"{directory / 'config.json'}: {error}") from error


class _FinetuningRun(TrainingRun):
    """The stages of one run, in order."""

    def carry_out(self, photon: PhotonConfig) -> None:
        if self.is_main and (self.start / FILE_NAME).is_file():
            verify_manifest(self.start)
        self.preset = photon.preset
        tokenizer = load_tokenizer(self.start, photon.vocab_size, self.config.dataset)
        if self.config.dataset.stream:
            self.begin()  # the tokens are written into the output
        processes = self.accelerator.num_processes
        text = load_text(self.config, tokenizer, photon.top_span, processes, self.is_main, self.main_first)
        self.say(f"Data: {text}.")
        self.begin()
        self.finish(text)

    def describe(self, photon: dict[str, Any]) -> dict[str, Any]:
        return {"model": self.config.model, "preset": self.preset, "start_ce": photon["initial_ce"]}

    def paths(self) -> dict[str, str]:
        return {"model before": str(self.start)}
