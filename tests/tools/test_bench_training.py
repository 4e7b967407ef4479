"""The training benchmark: what it checks before it times, and what it writes."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from photon_train.config import RunConfig, TrainSettings
from photon_train.errors import PhotonError

PATH = Path(__file__).resolve().parents[2] / "tools" / "bench_training.py"


@pytest.fixture(scope="module")
def tool():
    specification = importlib.util.spec_from_file_location("bench_training", PATH)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_rows_and_plot_are_written(tool, tmp_path, monkeypatch):
    """Both systems at every context, with ratios."""
    output = tmp_path / "speed.json"
    contexts = ["256", "512"]
    monkeypatch.setattr(sys, "argv", ["bench", "--output", str(output), "--turns", "1", "--contexts", *contexts])
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)  # the tests beside this one keep theirs
    tool.main()
    record = json.loads(output.read_text())
    assert [(row["system"], row["context"]) for row in record["rows"]] == [
        (system, int(context)) for context in contexts for system in tool.SYSTEMS
    ]
    assert record["checks"]["logits_difference"] < 2e-4
    photon = [row for row in record["rows"] if row["system"] == "photon"]
    assert photon[0]["added_bytes_per_token"] is None and photon[1]["added_bytes_per_token"] > 0
    assert all(row["tokens_per_s"] > 0 and row["peak_ratio"] > 1 for row in photon)
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_another_function_is_not_timed(tool):
    config = LlamaConfig(**tool.SHAPES["tiny"])
    models = tool.make_models(config, RunConfig(train=TrainSettings(seq_len=64)))
    ids = torch.randint(config.vocab_size, (1, 64))
    assert tool.check_function(models, ids) < 2e-4
    with torch.no_grad():
        models["photon"].model.layers[1].mlp.down_proj.weight.mul_(1.5)
    with pytest.raises(PhotonError, match="differs from the dense model"):
        tool.check_function(models, ids)
    # What is timed has its own window again.
    assert models["photon"].config.window == 64
