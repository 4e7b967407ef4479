"""Peak host memory of each process while a model is loaded and divided for ZeRO-3.

    python tools/measure_loading.py --output benchmarks/training/loading.json

A PHOTON model of random weights is loaded in two processes on the CPU (`accelerate_configs/cpu_zero3.yaml`), as
fine-tuning does: by the main process alone, from which the others get their shards (`main`). For comparison every
process loads it whole and DeepSpeed divides it (`every`). Resident memory is the system's count, less what the process
had before.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from photon_train.cli import main_wrapper
from photon_train.config import LoraSettings, RunConfig, TrackingSettings, TrainSettings
from photon_train.errors import PhotonError
from photon_train.evaluation.report import write_rows
from photon_train.models import PhotonConfig, PhotonForCausalLM
from photon_train.pipeline.devices import weight_bytes
from photon_train.training.accelerator import make_accelerator
from photon_train.training.loop import prepare_for_evaluation
from photon_train.training.lora import add_lora
from photon_train.training.losses import TrainingObjective
from photon_train.training.shards import empty_model

ROOT = Path(__file__).resolve().parents[1]
WAYS = ("every", "main")
SHAPE = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 3,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 8192,
    "memory_cells": {0: [0], 2: [1]},
}


def memory(field: str) -> int:
    """Bytes of this process that the system states: ``VmRSS`` now, ``VmHWM`` at most since `forget_peak`."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def load(directory: Path, way: str, output: Path) -> None:
    """In one of the processes: load, add adapters, divide; append what it took to `output`."""
    run = RunConfig(
        train=TrainSettings(seq_len=64, mixed_precision="no"),
        lora=LoraSettings(rank=8),
        tracking=TrackingSettings(tracker="none"),
    )
    accelerator = make_accelerator(run, output)
    accelerator.wait_for_everyone()
    before = memory("VmRSS")
    forget_peak()
    if way == "every" or accelerator.is_main_process:
        model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto")
    else:
        model = empty_model(directory)
    objective = TrainingObjective(add_lora(model, run.lora))
    objective = accelerator.prepare(objective) if way == "every" else prepare_for_evaluation(accelerator, objective)
    accelerator.wait_for_everyone()
    row = {
        "loads": way,
        "process": accelerator.process_index,
        "peak_bytes": memory("VmHWM") - before,
        "afterwards_bytes": memory("VmRSS") - before,
    }
    (output / f"{accelerator.process_index}.json").write_text(json.dumps(row), encoding="utf-8")


def measure(shape: dict[str, Any], num_processes: int = 2) -> list[dict[str, Any]]:
    """A row per way and process.

    Raises:
        PhotonError: with the first error that the processes told, if they fail.
    """
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch, "model")
        torch.manual_seed(0)
        PhotonForCausalLM(PhotonConfig(**shape)).save_pretrained(directory)
        for way in WAYS:
            output = Path(scratch, way)
            output.mkdir()
            command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
            command += ["--config_file", str(ROOT / "accelerate_configs" / "cpu_zero3.yaml")]
            command += ["--num_processes", str(num_processes), __file__, "--output", str(output)]
            command += ["--load", str(directory), "--way", way]
            environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
            done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
            if done.returncode:
                lines = [line.strip() for line in done.stderr.splitlines() if "rror:" in line]
                raise PhotonError(f"{way}: {lines[0] if lines else f'exit status {done.returncode}'}")
            found = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(output.iterdir())]
            rows += [{**row, "weight_bytes": weight_bytes(directory)} for row in found]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON to write")
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)  # how this program starts itself
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.load:
        load(options.load, options.way, options.output)
        return
    rows = measure(SHAPE)
    for row in rows:
        print(json.dumps(row))
    write_rows(options.output, rows, command=f"python tools/measure_loading.py --output {options.output}")


if __name__ == "__main__":
    main_wrapper(main)
