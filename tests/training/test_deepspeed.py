"""Two processes through the real launcher against one process at the same global batch.

Tolerance: 1e-4 relative on losses, gradient norms and held-out cross-entropy, fp32 on CPU: what the order of a sum may
change. Each launch trains a graft with memory and distillation, then a block model with consistency loss. A run of two
processes that one continues is held to the same tolerance (ZeRO-2 from four to two: test_nodes.py).
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file
from tiny_training import PHOTON_MODELS, tiny_data, tiny_model

from photon_train.training.losses import TrainingObjective, num_target_tokens

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("run_tiny.py")
ACCELERATE = ["-m", "accelerate.commands.launch", "--main_process_port", "0"]
LAUNCHERS = {
    "zero2": [*ACCELERATE, "--config_file", str(ROOT / "accelerate_configs" / "cpu_zero2.yaml")],
    "zero3": [*ACCELERATE, "--config_file", str(ROOT / "accelerate_configs" / "cpu_zero3.yaml")],
    "ddp": ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
}
KINDS = {"zero2": ("DEEPSPEED", 2), "zero3": ("DEEPSPEED", 3), "ddp": ("MULTI_CPU", 0)}


@pytest.fixture(scope="module")
def one_process(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("one")
    _run_tiny().main(output, 4, list(PHOTON_MODELS))
    return output


def _run_tiny() -> ModuleType:
    spec = importlib.util.spec_from_file_location("run_tiny", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _launch(launcher: str, output: Path, *options: str, batch_size: int = 2, models=PHOTON_MODELS) -> None:
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in (".", "kernels", "tests/support")),
    }
    command = [sys.executable, *LAUNCHERS[launcher], *options, str(SCRIPT), str(output), str(batch_size), *models]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("launcher", sorted(LAUNCHERS))
def test_two_processes_compute_what_one_computes(launcher, one_process, tmp_path):
    _launch(launcher, tmp_path)
    for name in PHOTON_MODELS:
        one, two = (json.loads((folder / f"{name}.json").read_text()) for folder in (one_process, tmp_path))
        assert (one["processes"], two["processes"]) == (1, 2)
        assert (two["kind"], two["stage"]) == KINDS[launcher]
        for key in ("train/loss", "train/grad_norm", "eval/ce"):
            assert two[key] == pytest.approx(one[key], rel=1e-4), (name, key)
        assert two["eval/ce"][-1] < two["eval/ce"][0]
        _check_gathered(name, tmp_path / f"{name}.safetensors", two["eval/ce"][-1])
        if "resumed" in two:
            assert two["resumed"] == pytest.approx(two["dropout"], rel=1e-6)
            assert two["dropout"][-1] != pytest.approx(two["train/loss"][-1], rel=1e-4)
            # A step that one process spoils is skipped by all of them.
            assert one["skipped"] == two["skipped"] == {"3": 1, "4": 1, "5": 2, "6": 2}
            # Evaluated without a training, a model is in shards as well.
            assert two["untrained"] == pytest.approx(one["eval/ce"][0], rel=1e-4)
            assert (two["largest"] < 100) == (launcher == "zero3")
            assert len(one["poisoned"]) == 5 and two["poisoned"] == pytest.approx(one["poisoned"], rel=1e-4)
    if launcher != "zero2":
        _check_continued_by_one_process(launcher, tmp_path, one_process)


def _check_continued_by_one_process(launcher: str, output: Path, one_process: Path) -> None:
    name = PHOTON_MODELS[0]
    shutil.rmtree(output / "checkpoints" / name / "step_000004")
    if launcher == "ddp":
        _run_tiny().main(output, 4, [name])
    else:
        _launch(launcher, output, "--num_processes", "1", batch_size=4, models=[name])
    expected, found = (json.loads((folder / f"{name}.json").read_text()) for folder in (one_process, output))
    assert found["processes"] == 1
    for key in ("train/loss", "eval/ce"):
        assert found[key] == pytest.approx(expected[key], rel=1e-4), key


@torch.no_grad()
def _check_gathered(name: str, file: Path, expected: float) -> None:
    """The gathered weights, merged, in a fresh model without adapters give the held-out loss of the trained one."""
    model = tiny_model(name, seed=9)
    model.load_state_dict(load_file(file))
    held_out = tiny_data(7, seed=2, documents=name.startswith("memory")).batch(torch.arange(5))
    one = torch.ones((), dtype=torch.long)
    ce = TrainingObjective(model).eval()(**held_out, target_tokens=num_target_tokens(held_out["labels"]), sequences=one)
    assert float(ce["ce"]) == pytest.approx(expected, rel=1e-4)
