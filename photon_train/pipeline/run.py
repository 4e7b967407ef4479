"""A conversion run: dense checkpoint -> plan -> converted -> fine-tuned -> exported -> reloaded (DESIGN 1)."""

from __future__ import annotations

import dataclasses
import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list

from photon_train.config import DistillSettings, RunConfig, to_dict
from photon_train.conversion.apply import convert
from photon_train.conversion.calibrate import calibrate_directory, calibration_batches
from photon_train.conversion.source import DenseCheckpoint
from photon_train.data.demo import demo_dense_model
from photon_train.errors import PhotonError
from photon_train.files import atomic_directory, atomic_write_text, check_can_write
from photon_train.manifest import verify_manifest
from photon_train.pipeline.announce import announced
from photon_train.pipeline.base import TrainingRun, outcome
from photon_train.pipeline.choose import choose_cells, wants_probe, with_cells
from photon_train.pipeline.devices import roomy_device, weight_bytes
from photon_train.pipeline.prepare import (
    Conversion,
    Text,
    demo_checkpoint,
    document_alignment,
    load_text,
    load_tokenizer,
    plan_conversion,
    show_conversion,
)
from photon_train.pipeline.stages import Stages
from photon_train.training.accelerator import make_accelerator
from photon_train.training.base_bits import StoredWeights, quantise_base
from photon_train.training.checkpoint import text_hashes
from photon_train.training.collect import gather_full_model
from photon_train.training.loop import evaluate, prepare_for_evaluation
from photon_train.training.losses import TrainingObjective
from photon_train.training.shards import empty_model

DENSE_FINETUNED = "dense-finetuned"


def run_conversion(config: RunConfig, families: tuple[str, ...] | None = None) -> None:
    """Carry out a whole run, or with `dry_run` plan and estimate it.

    Every process of `accelerate launch` calls it. Finished stages of a resumed run are not done again. The output
    directory is created once the checkpoint, the settings, the tokenizer and the text have been found sound.

    Args:
        config: The run.
        families: Model types that the recipe is for; None takes every supported one.

    Raises:
        PhotonError: for bad input, before work starts where it can be known.
    """
    rank, num_processes = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if config.dry_run:
        if rank == 0:
            conversion = plan_conversion(_open(config, families, weights=False), config, num_processes)
            show_conversion(conversion)
            if wants_probe(config, conversion.config):
                print("The run will choose as many memory cells by a probe of the dense model on its text.")
        return
    with Stages(config, rank == 0, num_processes) as stages:
        if config.model is not None:
            # Settings that cannot be served are known before the processes join.
            plan_conversion(_open(config, families), config, num_processes)
        _ConversionRun(config, make_accelerator(config, config.output), stages).carry_out()


def _open(config: RunConfig, families: tuple[str, ...] | None = None, weights: bool = True) -> DenseCheckpoint:
    """The dense checkpoint; without `weights`, from what its configuration tells where that is all there is."""
    if config.model is None:
        return demo_checkpoint()
    checkpoint = DenseCheckpoint.open(config.model, config.hub.revision, config.hub.token, weights=weights)
    if families is not None and checkpoint.config.model_type not in families:
        raise PhotonError(
            f"{config.model} is a {checkpoint.config.model_type} model and this command is for {', '.join(families)}: "
            "take `photon-train convert`, which converts every supported family"
        )
    return checkpoint


class _ConversionRun(TrainingRun):
    """The stages of one run, in order."""

    def carry_out(self) -> None:
        self.start = self.output / "converted"
        directory = self._dense_directory()
        self.conversion = conversion = self._plan(directory)
        # The type that the plan resolved: the model's own may be what it was loaded in.
        self.dtype, self.numbers = conversion.plan.dtype, conversion.estimate
        tokenizer = load_tokenizer(directory, conversion.checkpoint.config.vocab_size, self.config.dataset)
        align, processes = document_alignment(conversion.config, self.config), self.accelerator.num_processes
        if self.config.dataset.stream:
            self.begin()  # the tokens are written into the output
        text = load_text(self.config, tokenizer, align, processes, self.is_main, self.main_first)
        self.say(f"Data: {text}.")
        self.stages.bind_text(text_hashes(text.train, text.held_out))
        sizes = {self.start: conversion.plan.num_bytes, self.exported: conversion.plan.num_bytes}
        if self.config.train.dense_baseline:
            sizes[self.output / DENSE_FINETUNED] = weight_bytes(directory)
        self.check_disk(sizes)
        self.begin()
        if wants_probe(self.config, conversion.config):
            self._choose_cells(directory, text)
            conversion = self.conversion
        self._convert(conversion, text)
        self.stages.run("dense", partial(self._dense_rows, directory, text))
        self.finish(text, teacher=directory)

    def _choose_cells(self, directory: Path, text: Text) -> None:
        """Plan again with the cells that the probe names; a resumed run keeps those it was begun with."""

        def probe() -> dict[str, Any]:
            return {"cells": choose_cells(self.config, directory, text, self.accelerator.device)}

        found = [self.stages.run("probe", probe)["cells"] if self.is_main else None]
        (cells,) = broadcast_object_list(found)
        self.config = with_cells(self.config, cells)
        self.conversion = self._plan(directory)
        self.numbers = self.conversion.estimate

    def describe(self, photon: dict[str, Any]) -> dict[str, Any]:
        dense = self.stages.done["dense"]
        return {
            "model": self.config.model or "the demo's dense Llama",
            "preset": self.config.preset,
            "dense_ce": dense["initial_ce"],
            "dense_tuned_ce": dense.get("final_ce"),
            "converted_ce": photon["initial_ce"],
        }

    def paths(self) -> dict[str, str]:
        finetuned = self.output / DENSE_FINETUNED
        return {
            "dense model": str(self.conversion.checkpoint.directory),
            **({"fine-tuned dense model": str(finetuned)} if finetuned.exists() else {}),
            "plan": str(self.output / "plan.json"),
            "converted model": str(self.start),
        }

    def _dense_directory(self) -> Path:
        if self.config.model is not None:
            return _open(self.config).directory
        self.say("No --model given: the demo's small dense Llama, pretrained on first use and then cached.")
        found = {}

        def pretrain() -> dict[str, Any]:
            found["path"] = demo_dense_model(progress=self.is_main)
            return {"path": str(found["path"])}

        recorded = self.main_first(partial(self.stages.run, "pretrain", pretrain))
        path = Path(recorded["path"])
        return path if path.is_dir() else demo_dense_model(progress=self.is_main)

    def _plan(self, directory: Path) -> Conversion:
        checkpoint = DenseCheckpoint.open(str(directory))
        conversion = plan_conversion(checkpoint, self.config, self.accelerator.num_processes)
        if self.is_main:
            show_conversion(conversion)
        return conversion

    def _convert(self, conversion: Conversion, text: Text) -> None:
        def write() -> dict[str, Any]:
            if self.start.exists():
                return {}  # a run that was killed right after: a directory is there only when it is complete
            device = roomy_device(self.accelerator.device, conversion.estimate.conversion_bytes)
            convert(
                conversion.checkpoint,
                conversion.plan,
                conversion.config,
                self.start,
                self.config.export.max_shard_size,
                run_config=to_dict(self.config),
                on_written=partial(_fit, batches=calibration_batches(text.train), device=device),
            )
            return {}

        if self.is_main:
            atomic_write_text(self.output / "plan.json", conversion.plan.to_json())
            if "convert" in self.stages.done or self.start.exists():
                verify_manifest(self.start)
            self.stages.run("convert", write)
        self.accelerator.wait_for_everyone()

    def _dense_rows(self, directory: Path, text: Text) -> dict[str, Any]:
        """The dense model as it is, and fine-tuned as PHOTON will be."""
        model = self.load(directory)
        if not self.config.train.dense_baseline:
            # Where the base is rounded, it is judged as PHOTON's is.
            model = quantise_base(model, self.config.train, self.accelerator)
            objective = prepare_for_evaluation(self.accelerator, TrainingObjective(model))
            return {"initial_ce": evaluate(self.accelerator, objective, text.held_out, self.config)}
        self.say("Fine-tuning the dense model the same way, for comparison.")
        config = _as_baseline(self.config)
        result = self.train(self.with_adapters(model), config, text, name="dense")
        state = gather_full_model(self.accelerator, result.model, StoredWeights(directory))
        if self.is_main:
            self._save_dense(directory, state, text)
        return outcome(result)

    def _save_dense(self, directory: Path, state: dict[str, torch.Tensor], text: Text) -> None:
        """The fine-tuned dense model as a checkpoint: what the export can be measured against on other tasks."""
        output = self.output / DENSE_FINETUNED
        if output.exists():  # a run that was stopped right after: a directory is there only when it is complete
            return
        check_can_write(output, weight_bytes(directory), "the fine-tuned dense model")
        model = empty_model(directory)
        model.load_state_dict({name: tensor.to(model.dtype) for name, tensor in state.items()}, assign=True)
        model.tie_weights()
        with atomic_directory(output) as partial_output:
            model.save_pretrained(partial_output, max_shard_size=self.config.export.max_shard_size)
            text.tokenizer.save_pretrained(partial_output)


def _fit(directory: Path, batches: list[torch.Tensor], device: torch.device) -> None:
    """`calibrate_directory` with a progress bar, and how long it will take."""
    sentence = f"Fitting the new modules to {sum(batch.numel() for batch in batches):,} tokens"
    with announced("fitting", sentence) as report:
        calibrate_directory(directory, batches, device, report)


def _as_baseline(config: RunConfig) -> RunConfig:
    """`config` for the dense model: no hierarchy to be consistent with, and no teacher."""
    return dataclasses.replace(
        config,
        distill=DistillSettings(),
        consistency=dataclasses.replace(config.consistency, weight=0.0),
    )
