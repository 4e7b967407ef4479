"""Long contexts of one real model under different caches: cross-entropy and retrieval at equal bytes.

python tools/compare_long.py --dense runs/smollm2 --data runs/text/train --held-out runs/text/heldout \
    --probe runs/smollm2-probe.json --plans tools/plans/smollm2.yaml --output benchmarks/quality/smollm2.json

A plan of the YAML file is a mapping with `plan` (dense, dense-finetuned, dense-window, or graft), an optional `name`,
and dotted settings of the recipe; `all` holds for every plan. `photon.memory_budget` takes the probe's best cells. A
plan with `run`, the output directory of a run of the recipe, measures the model that it fine-tuned. A dense plan with
`cache_bits` stores its cache in so many bits (transformers' QuantizedCache on optimum-quanto), one with `press` has its
prompts' cache compressed by that press of kvpress to the bytes of the plan that `same_cache_as` names. Rows that the
output already holds are not measured again, so a stopped comparison goes on; `--add` takes rows over from others,
measured on other machines or by other processes.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, QuantizedCache

from lib.benchmark import read_rows
from lib.converted import converted
from lib.plots import plot_frontier
from lib.presses import evaluate_pressed
from photon_train import accounting
from photon_train.checkpoints import with_softcap
from photon_train.cli import main_wrapper
from photon_train.config import DataSettings, RunConfig, load_config, read_yaml
from photon_train.conversion.calibrate import calibration_batches
from photon_train.conversion.cells import CellProbe
from photon_train.conversion.graft import count_cells, format_cells, memory_candidates
from photon_train.data.corpora import read_documents
from photon_train.data.packing import pack
from photon_train.errors import PhotonError
from photon_train.evaluation.long import LongInputs, LongSettings, evaluate_long, prepare_long
from photon_train.evaluation.report import write_rows
from photon_train.pipeline.run import DENSE_FINETUNED

_SHOWN = ("name", "length", "kv_growing_percent", "kv_total_percent", "ce_beyond_window", "ruler", "needle")
_CACHE_GROUP = 64  # numbers of a quantised dense cache that share a scale and a shift, at most


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dense", type=Path, required=True, help="the dense checkpoint")
    parser.add_argument("--data", required=True, help="text that new modules are fitted to")
    parser.add_argument("--held-out", required=True, help="text to measure on, other documents")
    parser.add_argument("--probe", type=Path, default=None, help="probe.json of a run, or of tools/probe_cells.py")
    parser.add_argument("--plans", type=Path, required=True, help="YAML file with the plans")
    parser.add_argument("--output", type=Path, required=True, help="JSON; a plot (.png) goes beside it")
    parser.add_argument("--only", nargs="*", default=None, help="names of the plans to measure")
    parser.add_argument("--lengths", nargs="+", type=int, default=[2048], help="tokens of texts and prompts (2048)")
    parser.add_argument("--sequences", type=int, default=8, help="texts per length (8)")
    parser.add_argument("--samples", type=int, default=10, help="prompts per RULER task and length (10)")
    parser.add_argument("--batch-size", type=int, default=4, help="prompts that are answered at once (4)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the prompts")
    parser.add_argument("--add", nargs="*", type=Path, default=[], help="outputs of this tool whose rows to take over")
    return parser.parse_args()


def settings_of(plan: dict[str, Any], common: dict[str, Any]) -> RunConfig:
    """The recipe's settings of a plan."""
    merged = {**common, **{key: value for key, value in plan.items() if "." in key}}
    if plan["plan"] == "dense-window":
        merged = {key: value for key, value in merged.items() if not key.startswith("photon.memory")}
        merged["photon.memory_cells"] = []
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in merged.items()}
    argv = [part for key, text in texts.items() for part in (f"--{key}", text)]
    return load_config(argv, prog="compare_long.py", description="")


class Comparison:
    """What all plans share: the dense checkpoint, its probe, and text to fit new modules to."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.dense, self.options = options.dense, options
        self.tokenizer = AutoTokenizer.from_pretrained(options.dense)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self._calibration: list[torch.Tensor] | None = None

    def open(self, plan: dict[str, Any], common: dict[str, Any]) -> PreTrainedModel:
        """The model of a plan, on the GPU if there is one."""
        return self._open(plan, common).to(self.device)

    def _open(self, plan: dict[str, Any], common: dict[str, Any]) -> PreTrainedModel:
        if plan["plan"] == "dense":
            return with_softcap(AutoModelForCausalLM.from_pretrained(self.dense, dtype="auto"))
        if "run" in plan:
            directory = DENSE_FINETUNED if plan["plan"] == "dense-finetuned" else "export"
            return with_softcap(AutoModelForCausalLM.from_pretrained(Path(plan["run"]) / directory, dtype="auto"))
        config = settings_of(plan, common)
        photon = config.photon
        if photon.memory_cells is None:
            cells = self._best_cells(config)
            config.photon = dataclasses.replace(photon, memory_cells=cells, memory_budget=None)
        return converted(self.dense, config, self._fitted_to(config), self.device)

    def _best_cells(self, config: RunConfig) -> list[str]:
        if self.options.probe is None:
            raise PhotonError("a plan with photon.memory_budget needs --probe: a run's probe.json")
        probe = CellProbe.from_json(self.options.probe.read_text(encoding="utf-8"))
        dense = AutoConfig.from_pretrained(self.dense)
        return format_cells(
            probe.best_cells(count_cells(dense, config.photon), memory_candidates(dense, config.photon))
        )

    def _fitted_to(self, config: RunConfig) -> list[torch.Tensor]:
        if self._calibration is None:
            documents = list(read_documents(self.options.data, DataSettings()))
            packed = pack(documents, self.tokenizer, config.train.seq_len, 1, self.tokenizer.eos_token_id)
            self._calibration = calibration_batches(packed)
        return self._calibration


def cache_percents(model: PreTrainedModel, length: int) -> dict[str, float]:
    """What grows with the text, and all of the cache at `length`, in percent of the dense model's in 16 bits."""
    if not hasattr(model, "new_cache"):
        return {"kv_growing_percent": 100.0, "kv_total_percent": 100.0}
    costs = accounting.costs_of(model.config)
    whole = accounting.dense_cache_bytes(costs.dense, length)
    held = accounting.cache_bytes(model.config, length)
    return {
        "kv_growing_percent": 100 * accounting.growing_bytes_per_token(model.config) * length / whole,
        "kv_total_percent": 100 * held.total / whole,
    }


class CopiedCache(QuantizedCache):
    """Its layers replace what they hold and never write into it; quanto's tensors cannot be copied deeply."""

    def __deepcopy__(self, memo: dict[int, Any]) -> CopiedCache:
        copied = copy.copy(self)
        copied.layers = [copy.copy(layer) for layer in self.layers]
        return copied


def evaluated(
    model: PreTrainedModel, plan: dict[str, Any], comparison: Comparison, inputs: LongInputs, rows: list[dict[str, Any]]
) -> Iterator[tuple[dict[str, Any], dict[str, float | None]]]:
    """What a plan's model gives at each length, and how large its cache is there.

    Args:
        rows: What has been measured: a press takes the size of another plan's cache from there.
    """
    tokenizer = comparison.tokenizer
    if "press" in plan:
        like = plan["same_cache_as"]
        totals = {row["length"]: row["kv_total_percent"] for row in rows if row["name"] == like}
        if missing := set(inputs.settings.lengths) - totals.keys():
            raise PhotonError(f"{plan['name']} takes the bytes of {like!r}: measure that first at {sorted(missing)}")
        for found in evaluate_pressed(model, tokenizer, inputs, plan["press"], totals.__getitem__):
            yield found, {"kv_growing_percent": None, "kv_total_percent": totals[found["length"]]}
    elif "cache_bits" in plan:
        bits, dtype_bits = plan["cache_bits"], torch.finfo(model.dtype).bits
        group = math.gcd(_CACHE_GROUP, model.config.head_dim)
        make_cache = partial(CopiedCache, "quanto", model.config, nbits=bits, q_group_size=group)
        percent = 100 * (bits + 2 * dtype_bits / group) / dtype_bits  # a scale and a shift for each group
        for found in evaluate_long(model, tokenizer, inputs, make_cache):
            yield found, {"kv_growing_percent": percent, "kv_total_percent": percent}
    else:
        for found in evaluate_long(model, tokenizer, inputs):
            yield found, cache_percents(model, found["length"])


def measure(
    model: PreTrainedModel, plan: dict[str, Any], comparison: Comparison, inputs: LongInputs, rows: list[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """A row per length, as it is measured."""
    cells = getattr(model.config, "memory_cells", None)
    trained, seconds = 0, None
    if "run" in plan:
        report = json.loads((Path(plan["run"]) / "report.json").read_text(encoding="utf-8"))
        stage = "dense" if plan["plan"] == "dense-finetuned" else "photon"
        trained, seconds = report["tokens"], report["seconds"][stage]
    for found, size in evaluated(model, plan, comparison, inputs, rows):
        yield {
            "plan": plan["plan"],
            "name": plan.get("name", plan["plan"]),
            "seed": inputs.settings.seed,
            **found,
            "tokens": trained,
            "training_seconds": seconds,
            **size,
            "cells": None if cells is None else format_cells(cells),
            "window": getattr(model.config, "window", None),
            "device": torch.cuda.get_device_name() if comparison.device == "cuda" else "cpu",
            "config": {key: value for key, value in plan.items() if key not in ("plan", "name")},
        }


def main() -> None:
    options = arguments()
    content = read_yaml(options.plans)
    common, plans = content.get("all", {}), content["plans"]
    plans = [plan for plan in plans if options.only is None or plan.get("name", plan["plan"]) in options.only]
    for run in (Path(plan["run"]) for plan in plans if "run" in plan):
        if not (run / "report.json").is_file():
            raise PhotonError(f"{run} holds no finished run: make it first, or leave its plan out with --only")
    comparison = Comparison(options)
    settings = LongSettings(
        tuple(options.lengths), options.sequences, options.samples, batch_size=options.batch_size, seed=options.seed
    )
    inputs = prepare_long(list(read_documents(options.held_out, DataSettings())), comparison.tokenizer, settings)
    rows = {row["key"]: row for path in (options.output, *options.add) for row in read_rows(path)}
    for plan in plans:
        keys = {length: row_key(options, settings, common, plan, length) for length in options.lengths}
        missing = tuple(length for length, key in keys.items() if key not in rows)
        if not missing:
            continue
        model = comparison.open(plan, common)
        wanted = dataclasses.replace(inputs, settings=dataclasses.replace(settings, lengths=missing))
        for row in measure(model, plan, comparison, wanted, list(rows.values())):
            key = keys[row["length"]]
            rows[key] = {"key": key, **row}
            print(json.dumps({column: row[column] for column in _SHOWN}), flush=True)
            write_rows(options.output, list(rows.values()), dense=options.dense.name, all=common)
    write_rows(options.output, list(rows.values()), dense=options.dense.name, all=common)
    plot_frontier(list(rows.values()), options.output.with_suffix(".png"))


def row_key(
    options: argparse.Namespace, settings: LongSettings, common: dict[str, Any], plan: dict[str, Any], length: int
) -> str:
    """What a row was measured by; how many prompts were answered at once changes nothing."""
    asked = {**dataclasses.asdict(settings), "lengths": [length], "batch_size": None}
    text = json.dumps([options.dense.name, asked, common, plan], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


if __name__ == "__main__":
    main_wrapper(main)
