"""A conversion run: dense checkpoint -> plan -> converted -> fine-tuned -> exported -> reloaded (DESIGN 1)."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, PreTrainedModel

from photon_train.cli import to_dict
from photon_train.config import RunConfig
from photon_train.conversion.apply import convert
from photon_train.conversion.calibrate import calibrate_directory
from photon_train.conversion.source import DenseCheckpoint
from photon_train.data.demo import demo_dense_model
from photon_train.evaluation.plots import plot_losses
from photon_train.evaluation.report import Report, machine, print_report, write_report
from photon_train.export.card import model_card
from photon_train.export.save import export_model
from photon_train.export.validate import validate_export
from photon_train.files import atomic_write_text, check_can_write
from photon_train.inference.text import generate_text, load_for_inference
from photon_train.manifest import read_manifest, verify_manifest
from photon_train.models import PhotonForCausalLM
from photon_train.pipeline.prepare import (
    Conversion,
    Text,
    demo_checkpoint,
    load_text,
    load_tokenizer,
    plan_conversion,
    show_conversion,
)
from photon_train.pipeline.stages import Stages
from photon_train.training.accelerator import make_accelerator
from photon_train.training.collect import gather_full_model
from photon_train.training.loop import TrainResult, evaluate, train
from photon_train.training.lora import add_lora
from photon_train.training.losses import TrainingObjective
from photon_train.training.progress import METRICS_FILE

_CALIBRATION_SEQUENCES = 4
_SAMPLE_PROMPT = 64  # tokens of held-out text that the sample goes on from
_SAMPLING = {"do_sample": True, "temperature": 0.8, "top_p": 0.95}  # greedy small models repeat themselves


def run_conversion(config: RunConfig) -> None:
    """Carry out a whole run, or with `dry_run` plan and estimate it.

    Every process of `accelerate launch` calls it. Finished stages of a resumed run are not done again. The output
    directory is created once the checkpoint, the settings, the tokenizer and the text have been found sound.

    Raises:
        PhotonError: for bad input, before work starts where it can be known.
    """
    rank, num_processes = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if config.dry_run:
        if rank == 0:
            show_conversion(plan_conversion(_open(config, weights=False), config, num_processes))
        return
    stages = Stages(config, writes=rank == 0)
    if config.model is not None:
        # Settings that cannot be served are known before the processes join.
        plan_conversion(_open(config), config, num_processes)
    _Run(config, make_accelerator(config, config.output), stages).carry_out()


def _open(config: RunConfig, weights: bool = True) -> DenseCheckpoint:
    """The dense checkpoint; without `weights`, from what its configuration tells where that is all there is."""
    if config.model is None:
        return demo_checkpoint()
    return DenseCheckpoint.open(config.model, config.hub.revision, config.hub.token, weights=weights)


class _Run:
    """The stages of one run, in order."""

    def __init__(self, config: RunConfig, accelerator: Accelerator, stages: Stages) -> None:
        self.config, self.accelerator, self.stages = config, accelerator, stages
        self.output = Path(config.output)
        self.is_main = accelerator.is_main_process
        self.converted, self.exported = self.output / "converted", self.output / "export"

    def carry_out(self) -> None:
        directory = self._dense_directory()
        conversion = self._plan(directory)
        tokenizer = load_tokenizer(directory, conversion.checkpoint.config.vocab_size, self.config.dataset)
        span, processes = conversion.config.top_span, self.accelerator.num_processes
        if self.config.dataset.stream:
            self.stages.begin(self.config)  # the tokens are written into the output
        text = load_text(self.config, tokenizer, span, processes, self.is_main, self._main_first)
        self._say(f"Data: {text}.")
        if not self.converted.exists():
            check_can_write(self.converted, conversion.plan.num_bytes, "the converted model")
        self.accelerator.wait_for_everyone()
        self.stages.begin(self.config)
        self._convert(conversion, text)
        dense = self.stages.run("dense", partial(self._dense_rows, directory, text))
        photon = self.stages.run("photon", partial(self._fine_tune_photon, directory, conversion, text))
        if self.is_main:
            sample = self.stages.run("sample", partial(self._write_sample, text))
            self._report(conversion, dense, photon, sample)
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()

    def _main_first(self, work: Callable[[], Any]) -> Any:
        with self.accelerator.main_process_first():
            return work()

    def _say(self, message: str) -> None:
        if self.is_main:
            print(message, file=sys.stderr, flush=True)

    # --- the dense model and the plan ---

    def _dense_directory(self) -> Path:
        if self.config.model is not None:
            return _open(self.config).directory
        self._say("No --model given: the demo's small dense Llama, pretrained on first use and then cached.")
        found = {}

        def pretrain() -> dict[str, Any]:
            found["path"] = demo_dense_model(progress=self.is_main)
            return {"path": str(found["path"])}

        recorded = self._main_first(partial(self.stages.run, "pretrain", pretrain))
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
            if self.converted.exists():
                return {}  # a run that was killed right after: a directory is there only when it is complete
            sequences = text.train.batch(torch.arange(min(_CALIBRATION_SEQUENCES, len(text.train))))["input_ids"]
            convert(
                conversion.checkpoint,
                conversion.plan,
                conversion.config,
                self.converted,
                self.config.export.max_shard_size,
                run_config=to_dict(self.config),
                on_written=partial(calibrate_directory, batches=[sequences]) if self.config.photon.calibrate else None,
            )
            return {}

        if self.is_main:
            atomic_write_text(self.output / "plan.json", conversion.plan.to_json())
            if "convert" in self.stages.done or self.converted.exists():
                verify_manifest(self.converted)
            self.stages.run("convert", write)
        self.accelerator.wait_for_everyone()

    # --- training ---

    def _load(self, loader: type, directory: Path) -> PreTrainedModel:
        return self._main_first(lambda: loader.from_pretrained(directory, dtype="auto"))

    def _dense_rows(self, directory: Path, text: Text) -> dict[str, Any]:
        """The dense model as it is, and fine-tuned as PHOTON will be."""
        model = self._load(AutoModelForCausalLM, directory)
        if not self.config.train.dense_baseline:
            objective = TrainingObjective(model).to(self.accelerator.device)
            return {"initial_ce": evaluate(self.accelerator, objective, text.held_out, self.config)}
        self._say("Fine-tuning the dense model the same way, for comparison.")
        # The baseline has no hierarchy to be consistent with and no teacher to learn from.
        config = _without_auxiliary_losses(self.config)
        model = add_lora(model, config.lora, config.seed)
        return _outcome(self._train(model, config, text, name="dense"))

    def _fine_tune_photon(self, directory: Path, conversion: Conversion, text: Text) -> dict[str, Any]:
        self._say("Fine-tuning PHOTON.")
        model = self._load(PhotonForCausalLM, self.converted)
        teacher = None
        if self.config.distill.weight and not (model.supports_dense_forward() and self.config.lora.rank):
            teacher = self._load(AutoModelForCausalLM, directory)
        model = add_lora(model, self.config.lora, self.config.seed)
        trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        ratio = {"photon/kv_ratio": conversion.estimate.kv_ratio}
        result = self._train(model, self.config, text, name="photon", teacher=teacher, extra_log=ratio)
        sequences = min(self.config.train.eval_sequences, len(text.held_out))
        outcome = {**_outcome(result), "trainable_parameters": trainable, "held_out_sequences": sequences}
        state = gather_full_model(self.accelerator, result.model)
        if self.is_main:
            self._export(state, text, conversion, outcome)
            check = validate_export(self.exported, self._reference(result.model), device=self.accelerator.device)
            outcome["export_check"] = check.to_dict()
        return outcome

    def _reference(self, trained: torch.nn.Module) -> torch.nn.Module | None:
        """The trained model, to compare its export with; None where it cannot run alone.

        That is where its weights are sharded (ZeRO-3), or of several types that only autocast reconciles.
        """
        model = self.accelerator.unwrap_model(trained).model
        parameters = list(model.parameters())
        sharded = any(hasattr(parameter, "ds_id") for parameter in parameters)
        return None if sharded or len({parameter.dtype for parameter in parameters}) > 1 else model

    def _train(self, model: PreTrainedModel, config: RunConfig, text: Text, **settings: Any) -> TrainResult:
        return train(model, text.train, text.held_out, config, self.output, accelerator=self.accelerator, **settings)

    # --- export and report ---

    def _export(self, state: dict[str, torch.Tensor], text: Text, conversion: Conversion, outcome: dict) -> None:
        if self.exported.exists():
            # A run that was stopped right after its export: a directory is there only when it is complete.
            verify_manifest(self.exported)
            return
        model = PhotonForCausalLM.from_pretrained(self.converted, dtype="auto")
        export_model(
            model,
            text.tokenizer,
            self.exported,
            # The type that the plan resolved: the model's own may be what it was loaded in.
            settings=dataclasses.replace(self.config.export, dtype=conversion.plan.dtype),
            card=model_card(self._make_report(conversion, self.stages.done["dense"], outcome).to_dict()),
            state_dict=state,
            run_config=to_dict(self.config),
            inputs={"converted": self.converted},
        )

    def _write_sample(self, text: Text) -> dict[str, Any]:
        """Reload the export and let it write."""
        model, tokenizer = load_for_inference(self.exported)
        prompt = self.config.export.sample_prompt
        if prompt is None:
            prompt = tokenizer.decode(
                text.held_out.batch(torch.tensor([0]))["input_ids"][0, :_SAMPLE_PROMPT].tolist(),
                skip_special_tokens=True,
            )
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(self.config.seed)
            settings = {"max_new_tokens": self.config.export.sample_tokens, **_SAMPLING}
            written = generate_text(model, tokenizer, [prompt], **settings)[0]
        return {"prompt": prompt, "text": written}

    def _make_report(self, conversion: Conversion, dense: dict, photon: dict, sample: dict | None = None) -> Report:
        config, numbers = self.config, conversion.estimate
        report = Report(
            model=config.model or "the demo's dense Llama",
            data=config.data or "the Python standard library",
            preset=config.preset,
            dense_ce=dense["initial_ce"],
            dense_tuned_ce=dense.get("final_ce"),
            converted_ce=photon["initial_ce"],
            tuned_ce=photon["final_ce"],
            held_out_sequences=photon["held_out_sequences"],
            parameters=numbers.photon_parameters,
            dense_parameters=numbers.dense_parameters,
            trainable_parameters=photon["trainable_parameters"],
            dense_kv_per_token=numbers.dense_kv_per_token,
            photon_kv_per_token=numbers.photon_kv_per_token,
            photon_kv_constant=numbers.photon_kv_constant,
            steps=photon["steps"],
            tokens=photon["tokens"],
            machine=machine(),
        )
        if sample is not None:
            report.seconds = self.stages.seconds()
            report.sample_prompt, report.sample_text = sample["prompt"], sample["text"]
            report.export_check = photon["export_check"]
            report.versions = read_manifest(self.exported)["versions"]
            report.paths = {
                "dense model": str(conversion.checkpoint.directory),
                "plan": str(self.output / "plan.json"),
                "converted model": str(self.converted),
                "checkpoints": str(self.output / "checkpoints"),
                "exported model": str(self.exported),
                "settings": str(self.output / "config.yaml"),
                "metrics": str(self.output / METRICS_FILE),
                "loss curves": str(self.output / "losses.png"),
            }
        return report

    def _report(self, conversion: Conversion, dense: dict, photon: dict, sample: dict) -> None:
        report = self._make_report(conversion, dense, photon, sample)
        plot_losses(self.output / METRICS_FILE, self.output / "losses.png")
        write_report(report, self.output)
        print_report(report)


def _without_auxiliary_losses(config: RunConfig) -> RunConfig:
    return dataclasses.replace(
        config,
        distill=dataclasses.replace(config.distill, weight=0.0),
        consistency=dataclasses.replace(config.consistency, weight=0.0),
    )


def _outcome(result: TrainResult) -> dict[str, Any]:
    return {
        "initial_ce": result.initial_ce,
        "final_ce": result.metrics["eval/ce"],
        "tokens": result.tokens,
        "steps": result.steps,
        "seconds": result.seconds,
    }
