"""What every run does with a PHOTON checkpoint: fine-tune it, export it, let the export write, report."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, PreTrainedModel

from photon_train.accounting import Estimate
from photon_train.checkpoints import with_softcap
from photon_train.config import RunConfig, to_dict
from photon_train.errors import PhotonError
from photon_train.evaluation.plots import plot_losses
from photon_train.evaluation.report import Report, machine, print_report, write_report
from photon_train.export.card import model_card
from photon_train.export.save import check_weights, export_model
from photon_train.export.validate import validate_export
from photon_train.files import check_can_write
from photon_train.inference.defaults import without_sampling
from photon_train.inference.text import generate_text, load_for_inference
from photon_train.manifest import read_manifest, verify_manifest
from photon_train.pipeline.devices import roomy_device, weight_bytes
from photon_train.pipeline.prepare import Text, data_name
from photon_train.pipeline.stages import Stages
from photon_train.training.artifacts import log_export
from photon_train.training.base_bits import StoredWeights, is_quantised, quantise_base
from photon_train.training.collect import gather_full_model
from photon_train.training.loop import TrainResult, train
from photon_train.training.lora import add_lora
from photon_train.training.progress import METRICS_FILE
from photon_train.training.shards import empty_model, is_sharded

_SAMPLE_PROMPT = 64  # tokens of held-out text that the sample goes on from
_SAMPLING = {"do_sample": True, "temperature": 0.8, "top_p": 0.95}  # greedy small models repeat themselves


class TrainingRun:
    """The stages from a PHOTON checkpoint on; `carry_out` of a subclass sets the attributes below and calls them.

    Attributes:
        start: The PHOTON checkpoint that is fine-tuned.
        dtype: Type of the exported weights.
        numbers: The run's estimate.
    """

    start: Path
    dtype: str
    numbers: Estimate

    def __init__(self, config: RunConfig, accelerator: Accelerator, stages: Stages) -> None:
        self.config, self.accelerator, self.stages = config, accelerator, stages
        self.output = Path(config.output)
        self.is_main = accelerator.is_main_process
        self.exported = self.output / "export"

    def describe(self, photon: dict[str, Any]) -> dict[str, Any]:
        """The fields of the report that depend on the kind of run, from the result of the fine-tuning."""
        raise NotImplementedError

    def paths(self) -> dict[str, str]:
        """Where what is particular to the kind of run lies, by name."""
        raise NotImplementedError

    def main_first(self, work: Callable[[], Any]) -> Any:
        """Run `work` on the main process, then on the others."""
        with self.accelerator.main_process_first():
            return work()

    def begin(self) -> None:
        """Create the output directory, once every process has looked whether it is empty: NCCL joins them later."""
        self.accelerator.wait_for_everyone()
        self.stages.begin(self.config)

    def check_disk(self, sizes: dict[Path, int]) -> None:
        """Check that the disk takes all models that the run is still to write, in bytes by directory.

        Raises:
            PhotonError: if not.
        """
        missing = {directory: size for directory, size in sizes.items() if not directory.exists()}
        if missing:
            names = " with ".join(f"{directory.name}/" for directory in missing)
            check_can_write(next(iter(missing)), sum(missing.values()), names)

    def say(self, message: str) -> None:
        """A line of progress, from the main process."""
        if self.is_main:
            print(message, file=sys.stderr, flush=True)

    def finish(self, text: Text, teacher: Path | None = None) -> None:
        """All stages from the fine-tuning to the report.

        Args:
            text: What is trained on.
            teacher: The dense model to distil from where the PHOTON model does not hold it.
        """
        photon = self.stages.run("photon", partial(self._fine_tune, text, teacher))
        if self.is_main:
            sample = self.stages.run("sample", partial(self._write_sample, text))
            report = self._make_report(photon, sample)
            self.stages.run("artifact", partial(self._log_artifact, report))
            plot_losses(self.output / METRICS_FILE, self.output / "losses.png")
            write_report(report, self.output)
            print_report(report)
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()

    # --- training ---

    def load(self, directory: Path, is_trained: bool = True) -> PreTrainedModel:
        """A model in the checkpoint's type, on the CPU.

        Args:
            directory: Its checkpoint.
            is_trained: Whether it is for `train` or `prepare_for_evaluation`: with ZeRO-3 the main process alone then
                holds the weights, which are divided there. Otherwise every process holds them.

        Raises:
            PhotonError: if the checkpoint lacks a weight, for which transformers would draw numbers.
        """
        if is_trained and is_sharded(self.accelerator) and not self.is_main:
            return with_softcap(self.main_first(lambda: empty_model(directory)))
        model, found = self.main_first(
            lambda: AutoModelForCausalLM.from_pretrained(directory, dtype="auto", output_loading_info=True)
        )
        if missing := sorted(found["missing_keys"]):
            raise PhotonError(
                f"{directory} lacks tensor {missing[0]} ({len(missing)} in all), which its config.json calls for"
            )
        return with_softcap(model)

    def train(self, model: PreTrainedModel, config: RunConfig, text: Text, **settings: Any) -> TrainResult:
        """Fine-tune `model` with `config`."""
        settings = {"accelerator": self.accelerator, "retrieval": text.retrieval, **settings}
        return train(model, text.train, text.held_out, config, self.output, **settings)

    def _fine_tune(self, text: Text, teacher_directory: Path | None) -> dict[str, Any]:
        self.say("Fine-tuning PHOTON.")
        model = self.load(self.start)
        if self.is_main:
            check_weights(model, self.dtype)
        teacher = None
        holds_teacher = getattr(model, "holds_dense_model", False) and self.config.lora.rank
        if self.config.distill.is_on and not holds_teacher and teacher_directory is not None:
            teacher = self.load(teacher_directory, is_trained=False)
        model = self.with_adapters(model)
        trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        ratio = {"photon/kv_ratio": self.numbers.kv_ratio}
        result = self.train(model, self.config, text, name="photon", teacher=teacher, extra_log=ratio)
        sequences = min(self.config.train.eval_sequences, len(text.held_out))
        found = {**outcome(result), "trainable_parameters": trainable, "held_out_sequences": sequences}
        state = gather_full_model(self.accelerator, result.model, StoredWeights(self.start))
        if self.is_main:
            self._export(state, text, found)
            device = roomy_device(self.accelerator.device, weight_bytes(self.exported))
            reference, precision = self._reference(result.model)
            with precision:
                check = validate_export(self.exported, reference, device=device)
            found["export_check"] = check.to_dict()
        return found

    def with_adapters(self, model: PreTrainedModel) -> torch.nn.Module:
        """`model` as it is fine-tuned: its base in `train.base_bits`, adapters on it."""
        model = quantise_base(model, self.config.train, self.accelerator)
        return add_lora(model, self.config.lora, self.config.seed)

    def _reference(
        self, trained: torch.nn.Module
    ) -> tuple[torch.nn.Module | None, contextlib.AbstractContextManager[Any]]:
        """The trained model, to compare its export with, and the precision to do it in; None where it cannot run alone.

        That is where its weights are sharded (ZeRO-3), or of several types that only autocast reconciles. A quantised
        base is compared under autocast: what its rounding changes is what the user is to be told.
        """
        model = self.accelerator.unwrap_model(trained).model
        parameters = list(model.parameters())
        if any(map(is_quantised, model.modules())):
            return model, self.accelerator.autocast()
        sharded = any(hasattr(parameter, "ds_id") for parameter in parameters)
        alone = not sharded and len({parameter.dtype for parameter in parameters}) == 1
        return model if alone else None, contextlib.nullcontext()

    # --- export and report ---

    def _export(self, state: dict[str, torch.Tensor], text: Text, found: dict[str, Any]) -> None:
        if self.exported.exists():
            # A run that was stopped right after its export: a directory is there only when it is complete.
            verify_manifest(self.exported)
            return
        export_model(
            empty_model(self.start),
            text.tokenizer,
            self.exported,
            settings=dataclasses.replace(self.config.export, dtype=self.dtype),
            card=model_card(self._make_report(found).to_dict()),
            state_dict=state,
            run_config=to_dict(self.config),
            inputs={"converted": self.start},
        )

    def _write_sample(self, text: Text) -> dict[str, Any]:
        """Reload the export and let it write."""
        device = roomy_device(self.accelerator.device, weight_bytes(self.exported))
        model, tokenizer = load_for_inference(self.exported, device=str(device))
        # A sample shows the model, not what its generation_config.json makes of it.
        model.generation_config = without_sampling(model.generation_config)
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

    def _log_artifact(self, report: Report) -> dict[str, Any]:
        config = self.config
        inputs = {"model": config.model, "data": config.data}
        inputs |= {f"data {number}": source.path for number, source in enumerate(config.dataset.sources)}
        inputs = {role: source for role, source in inputs.items() if source is not None}
        return {"name": log_export(self.config, self.output, self.exported, inputs, report.to_dict())}

    def _make_report(self, photon: dict[str, Any], sample: dict[str, Any] | None = None) -> Report:
        numbers = self.numbers
        report = Report(
            data=data_name(self.config),
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
            **self.describe(photon),
        )
        if sample is not None:
            report.seconds = self.stages.seconds()
            report.sample_prompt, report.sample_text = sample["prompt"], sample["text"]
            report.export_check = photon["export_check"]
            report.versions = read_manifest(self.exported)["versions"]
            report.paths = {
                **self.paths(),
                "checkpoints": str(self.output / "checkpoints"),
                "exported model": str(self.exported),
                "settings": str(self.output / "config.yaml"),
                "metrics": str(self.output / METRICS_FILE),
                "loss curves": str(self.output / "losses.png"),
            }
        return report


def outcome(result: TrainResult) -> dict[str, Any]:
    """What of a training goes into the record of its stage."""
    return {
        "initial_ce": result.initial_ce,
        "final_ce": result.metrics["eval/ce"],
        "tokens": result.tokens,
        "steps": result.steps,
        "seconds": result.seconds,
    }
