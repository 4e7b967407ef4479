"""Train and evaluate conversion plans on one dense model, one text, one order of data and one budget.

python tools/compare_plans.py --dense runs/study/dense --plans tools/plans/screen.yaml \
    --output benchmarks/quality/screen.json

A plan of the YAML file is a mapping with `plan` (dense, dense-finetuned, dense-window, or a preset), an optional
`name`, `trained: false` to measure without training, `seeds`, and dotted settings of the recipe. What stands under
`all` holds for every plan. Rows that the output already holds are not computed again, so a stopped comparison goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import shutil
import tempfile
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from lib.benchmark import read_rows
from lib.plots import plot_quality
from lib.quality import Quality, measure_quality
from lib.repeats import Repeats
from lib.study import add_recovered, markdown_table
from lib.study_text import study_documents
from photon_train.accounting import TrainingSetup, costs_of, dense_flops, dense_parameters, estimate
from photon_train.checkpoints import with_softcap
from photon_train.cli import main_wrapper
from photon_train.config import RunConfig, load_config, read_yaml
from photon_train.conversion.apply import convert
from photon_train.conversion.calibrate import calibrate_directory, calibration_batches
from photon_train.conversion.presets import make_plan, photon_config
from photon_train.conversion.source import DenseCheckpoint
from photon_train.data.corpora import split_documents
from photon_train.data.packing import PackedDataset, pack
from photon_train.errors import PhotonError
from photon_train.evaluation.report import write_rows
from photon_train.files import atomic_write_text
from photon_train.training.accelerator import make_accelerator
from photon_train.training.loop import train
from photon_train.training.lora import add_lora, merge_lora

BEYOND = 256  # positions with more tokens before them count as beyond the window, in every row
STUDY_FILE = "study.json"  # recipe of `pretrain_dense.py`: which text is held out
_SHOWN = ("name", "seed", "ce", "ce_beyond_window", "ce_repeated", "copy_gain", "recovered_repeated", "seconds")
WINDOW_ONLY = {"preset": "graft", "photon.memory_cells": []}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dense", type=Path, required=True, help="what tools/pretrain_dense.py wrote")
    parser.add_argument("--plans", type=Path, required=True, help="YAML file with the plans")
    parser.add_argument("--output", type=Path, required=True, help="JSON; a table (.md) and plots (.png) go beside it")
    parser.add_argument("--only", nargs="*", default=None, help="names of the plans to run")
    parser.add_argument("--save", type=Path, default=None, help="directory for the trained models, by row number")
    return parser.parse_args()


@dataclasses.dataclass
class Study:
    """What every plan shares."""

    dense: Path
    train_set: Repeats
    held_out: PackedDataset
    accelerator: Accelerator


def open_study(directory: Path, seq_len: int, accelerator: Accelerator) -> Study:
    """The text of the study, split as the dense model's pretraining split it."""
    try:
        recipe = json.loads((directory / STUDY_FILE).read_text(encoding="utf-8"))
    except OSError as error:
        raise PhotonError(f"{directory} holds no {STUDY_FILE}: make the model with tools/pretrain_dense.py") from error
    tokenizer = AutoTokenizer.from_pretrained(directory)
    documents = study_documents(recipe["megabytes"] * 1e6)
    train_documents, held_out = split_documents(documents, recipe["settings"]["held_out_fraction"])
    packed = partial(pack, tokenizer=tokenizer, seq_len=seq_len, align=1, eos_id=tokenizer.eos_token_id)
    return Study(directory, Repeats(packed(train_documents), 0.25, 0.25, seed=1), packed(held_out), accelerator)


def settings_of(plan: dict[str, Any], common: dict[str, Any], seed: int) -> RunConfig:
    """The recipe's settings of a plan."""
    options = {key: value for key, value in plan.items() if "." in key or key == "preset"}
    if plan["plan"] == "dense-window":
        options = {**WINDOW_ONLY, **options}
    elif not plan["plan"].startswith("dense"):
        options = {"preset": plan["plan"], **options}
    if plan["plan"] == "paper":  # isolated chunks have no window
        common = {key: value for key, value in common.items() if key != "photon.window"}
    merged = {**common, **options, "seed": seed, "tracking.tracker": "none", "train.eval_sequences": 1}
    merged |= {"train.eval_every": 0, "train.save_every": 0}
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in merged.items()}
    argv = [part for key, text in texts.items() for part in (f"--{key}", text)]
    return load_config(argv, prog="compare_plans.py", description="")


def convert_plan(study: Study, config: RunConfig, directory: Path) -> PreTrainedModel:
    """The converted model of a plan, before training."""
    checkpoint = DenseCheckpoint.open(str(study.dense))
    target = photon_config(checkpoint.config, config)
    calibration = partial(calibrate_directory, batches=calibration_batches(study.train_set))
    convert(checkpoint, make_plan(checkpoint, target), target, directory, progress=False, on_written=calibration)
    return with_softcap(AutoModelForCausalLM.from_pretrained(directory, dtype="auto"))


def run_plan(study: Study, plan: dict[str, Any], config: RunConfig, save: Path | None = None) -> dict[str, Any]:
    """One row: convert, measure, train, measure; the trained model goes to `save`, ready to load."""
    began = time.perf_counter()
    is_dense, trained = plan["plan"] in ("dense", "dense-finetuned"), plan.get("trained", plan["plan"] != "dense")
    with tempfile.TemporaryDirectory() as scratch:
        if is_dense:
            model = with_softcap(AutoModelForCausalLM.from_pretrained(study.dense, dtype="auto"))
        else:
            model = convert_plan(study, config, Path(scratch) / "converted")
        sizes = _sizes(model, config, is_dense)
        initial = final = measure_quality(model, study.held_out, BEYOND)
        tokens = trainable = 0
        if trained:
            model = add_lora(model, config.lora, config.seed)
            trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
            result = train(
                model, study.train_set, study.held_out, config, Path(scratch) / "run", accelerator=study.accelerator
            )
            tokens = result.tokens
            model = study.accelerator.unwrap_model(result.model).model
            final = measure_quality(model, study.held_out, BEYOND)
            if save is not None:
                merge_lora(model).save_pretrained(save)
                AutoTokenizer.from_pretrained(study.dense).save_pretrained(save)
                shutil.copyfile(study.dense / STUDY_FILE, save / STUDY_FILE)
    return {
        "plan": plan["plan"],
        "name": plan.get("name", plan["plan"]),
        **_columns(final),
        "step0": _columns(initial),
        **sizes,
        "parameters_trainable": trainable,
        "tokens": tokens,
        "seed": config.seed,
        "seconds": time.perf_counter() - began,
        "config": {key: value for key, value in plan.items() if key not in ("plan", "name", "seeds")},
    }


def _columns(quality: Quality) -> dict[str, Any]:
    return asdict(quality)


def _sizes(model: PreTrainedModel, config: RunConfig, is_dense: bool) -> dict[str, Any]:
    if is_dense:
        count = dense_parameters(model.config)
        flops = dense_flops(model.config, config.train.seq_len)
        layers = model.config.num_hidden_layers
        return {"parameters": count, "kv_growing_percent": 100.0, "kv_constant_bytes": 0} | {
            "layer_positions": layers,
            "flops_per_token": flops,
        }
    numbers = estimate(costs_of(model.config).dense, model.config, TrainingSetup(config.train.seq_len))
    return {
        "parameters": numbers.photon_parameters,
        "kv_growing_percent": 100 * numbers.kv_ratio,
        "kv_constant_bytes": numbers.photon_kv_constant,
        "layer_positions": numbers.photon_layer_positions,
        "flops_per_token": numbers.photon_flops,
    }


def _write(options: argparse.Namespace, rows: list[dict[str, Any]], common: dict[str, Any]) -> None:
    """The rows with what follows from all of them, and the table."""
    for row in rows:
        unlimited = row["plan"] in ("dense", "dense-finetuned", "paper")
        window = row["config"].get("photon.window", common.get("photon.window"))
        row.setdefault("window", None if unlimited else window)
    add_recovered(rows)
    recipe = json.loads((options.dense / STUDY_FILE).read_text(encoding="utf-8"))
    write_rows(options.output, rows, dense=recipe, all=common)
    atomic_write_text(options.output.with_suffix(".md"), markdown_table(rows))


def main() -> None:
    options = arguments()
    content = read_yaml(options.plans)
    common, plans = content.get("all", {}), content["plans"]
    rows = read_rows(options.output)
    done = {row["key"] for row in rows}
    first = settings_of(plans[0], common, 0)
    study = open_study(options.dense, first.train.seq_len, make_accelerator(first, options.output.parent))
    for plan in plans:
        if options.only is not None and plan.get("name", plan["plan"]) not in options.only:
            continue
        for seed in plan.get("seeds", [0]):
            key = hashlib.sha256(json.dumps([common, plan, seed], sort_keys=True).encode()).hexdigest()[:16]
            if key in done:
                continue
            save = options.save and options.save / f"{len(rows):02d}-{plan['plan']}-{seed}"
            row = {"key": key, **run_plan(study, plan, settings_of(plan, common, seed), save)}
            rows.append(row)
            _write(options, rows, common)
            print(json.dumps({k: row.get(k) for k in _SHOWN}), flush=True)
    _write(options, rows, common)
    plot_quality(rows, options.output.with_suffix(".png"))


if __name__ == "__main__":
    main_wrapper(main)
