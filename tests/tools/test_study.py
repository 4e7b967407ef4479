"""The quality study's two commands, from text to a table, at a size that says nothing about quality."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from tiny_dense import dense_config

from photon_train.accounting import dense_cache_bytes, growing_bytes_per_token
from photon_train.config import read_yaml
from photon_train.conversion.presets import photon_config

ROOT = Path(__file__).resolve().parents[2]
# The plans of `compare_plans.py`; others are for a real model.
TOY_PLANS = sorted(path for path in (ROOT / "tools" / "plans").glob("*.yaml") if path.stem != "smollm2")
SETTINGS = {"train.seq_len": 1024, "train.batch_size": 1, "train.max_steps": 2, "train.mixed_precision": "no"}
SETTINGS |= {"photon.window": 64, "lora.rank": 2}
MEMORY = {"photon.memory_cells": ["1:0", "1:1"], "photon.memory_bits": 16, "photon.chunk_size": 4}


def tool(name: str, *arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "tools" / name), *map(str, arguments)]
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}, timeout=280)


def load_compare_plans() -> ModuleType:
    spec = importlib.util.spec_from_file_location("compare_plans", ROOT / "tools" / "compare_plans.py")
    compare_plans = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = compare_plans  # dataclasses look their module up
    spec.loader.exec_module(compare_plans)
    return compare_plans


@pytest.mark.parametrize("path", TOY_PLANS, ids=lambda path: path.stem)
def test_the_plans_of_the_study_can_be_converted(path: Path) -> None:
    compare_plans = load_compare_plans()
    content = read_yaml(path)
    model = dense_config(num_hidden_layers=8, hidden_size=128, max_position_embeddings=1024)
    for plan in content["plans"]:
        config = compare_plans.settings_of(plan, content["all"], seed=0)
        assert config.train.seq_len == 1024
        if plan["plan"] not in ("dense", "dense-finetuned"):
            photon = photon_config(model, config)
            assert photon.window == (None if plan["plan"] == "paper" else config.photon.window)
            if plan["plan"] == "dense-window":
                assert photon.memory_cells == {} and photon.num_sinks == 4


@pytest.mark.parametrize("name", ["latent", "ablations"])
def test_the_plans_of_the_study_are_those_of_its_rows(name: str) -> None:
    """By name: what grows in the cache is what the row says, so that a row can be measured again."""
    compare_plans = load_compare_plans()
    content = read_yaml(ROOT / "tools" / "plans" / f"{name}.yaml")
    recorded = json.loads((ROOT / "benchmarks" / "quality" / f"{name}.json").read_text())["rows"]
    growing = {row["name"]: row["kv_growing_percent"] for row in recorded if row["plan"] == "graft"}
    model, compared = dense_config(num_hidden_layers=8, hidden_size=128, max_position_embeddings=1024), 0
    for plan in content["plans"]:
        if plan["plan"] == "graft" and plan["name"] in growing:
            photon = photon_config(model, compare_plans.settings_of(plan, content["all"], seed=0))
            percent = 100 * growing_bytes_per_token(photon) / dense_cache_bytes(model, 1)
            assert percent == pytest.approx(growing[plan["name"]]), plan["name"]
            compared += 1
    assert compared > 10


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("study") / "dense"
    shape = ["--vocab-size", 320, "--hidden-size", 32, "--layers", 3, "--intermediate-size", 48]
    stages = ["--short", 64, 4, 4, "--long", 1024, 1, 2, "--probe-every", 4]
    done = tool("pretrain_dense.py", "--output", directory, "--megabytes", 1, "--held-out", 0.3, *shape, *stages)
    assert done.returncode == 0, done.stderr
    return directory


@pytest.mark.slow
def test_the_dense_model_comes_with_its_recipe_and_copy_gains(dense: Path) -> None:
    recipe = json.loads((dense / "study.json").read_text())
    assert recipe["tokens"] == 4 * 4 * 64 + 2 * 1024
    assert [record["step"] for record in recipe["history"]] == [4, 6]
    assert {"ce", "copy_300", "copy_600"} <= recipe["history"][-1].keys()


@pytest.mark.slow
def test_plans_are_compared_and_a_stopped_comparison_goes_on(dense: Path, tmp_path: Path) -> None:
    plans = [
        {"plan": "dense"},
        {"plan": "dense-window", "trained": False},
        {"plan": "dense-window", "photon.window": 72},
        {"plan": "dense-finetuned"},
        {"plan": "graft", "name": "memory", **MEMORY},
    ]
    (tmp_path / "plans.yaml").write_text(yaml.safe_dump({"all": SETTINGS, "plans": plans}))
    arguments = ("--dense", dense, "--plans", tmp_path / "plans.yaml", "--output", tmp_path / "out" / "study.json")
    done = tool("compare_plans.py", *arguments, "--only", "dense", "dense-window")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('"name"') == 3
    done = tool("compare_plans.py", *arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('"name"') == 2
    result = json.loads((tmp_path / "out" / "study.json").read_text())
    rows = {(row["name"], row["tokens"]): row for row in result["rows"]}
    assert set(rows) == {
        ("dense", 0),
        ("dense-window", 0),
        *((n, 2048) for n in ("dense-window", "dense-finetuned", "memory")),
    }
    assert (
        rows["dense", 0]["ce"] != rows["dense-finetuned", 2048]["ce"] == pytest.approx(rows["dense", 0]["ce"], abs=0.1)
    )
    assert rows["dense-window", 0]["copy_gain"] == pytest.approx(0.0, abs=1e-6)
    # One of three layers with a unit per 4 tokens.
    assert rows["memory", 2048]["kv_growing_percent"] == pytest.approx(100 / (3 * 4))
    assert rows["dense-window", 2048]["kv_growing_percent"] == 0
    assert {"machine", "versions", "commit"} <= result.keys()
    assert (tmp_path / "out" / "study.md").read_text().count("\n") == 2 + 5
    assert (tmp_path / "out" / "study.png").read_bytes().startswith(b"\x89PNG")
