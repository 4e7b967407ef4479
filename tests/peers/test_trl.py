"""TRL trains an export as it trains any causal LM: supervised and by preferences, with adapters and in full."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from math import log
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

# One process makes the export, for all who use it.
pytestmark = pytest.mark.xdist_group("export")
SCRIPT = Path(__file__).with_name("train_with_trl.py")


@pytest.fixture(scope="module")
def results(export: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `train_with_trl.py` found, in a process without photon-train."""
    directory = tmp_path_factory.mktemp("trl")
    environment = os.environ | {"HF_HOME": str(directory / "home"), "HF_MODULES_CACHE": str(directory / "modules")}
    command = [sys.executable, str(SCRIPT), str(export), str(directory)]
    done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return json.loads((directory / "results.json").read_text())


@pytest.mark.parametrize("training", ["sft-lora", "sft-full", "sft-packed", "dpo-lora", "dpo-full"])
def test_training(results: dict[str, Any], training: str) -> None:
    found = results[training]
    assert "error" not in found, found["error"]
    assert found["code"].startswith("transformers_modules."), "the export's own code was not used"
    losses = found["losses"]
    first, last = mean(losses[:4]), mean(losses[-4:])
    if training.startswith("dpo"):
        assert losses[0] == pytest.approx(log(2), abs=1e-5)  # the model and its reference are the same
    assert last < 0.8 * first, losses
    assert found["moved"] > 0.1
    # Saved and loaded again it is the trained model, with adapters, with merged adapters, and merged from disk.
    assert found["reloaded"] <= 1e-6
    if training.endswith("lora"):
        assert max(found["merged"], found["merged_reloaded"]) <= 2e-4
    else:
        assert "merged" not in found
