"""The comparison of caches on a real model, at a size that says nothing about quality."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import yaml
from tiny_checkpoint import tiny_checkpoint
from tiny_dense import dense_config
from tiny_prose import prose

from photon_train import accounting
from photon_train.config import read_yaml
from photon_train.conversion.cells import CellProbe, ProbedLoss
from photon_train.conversion.graft import count_cells
from photon_train.conversion.presets import photon_config
from photon_train.errors import PhotonError

ROOT = Path(__file__).resolve().parents[2]
LENGTH = 2048  # a prompt of the tasks is no shorter in bytes


def load_tool():
    spec = importlib.util.spec_from_file_location("compare_long", ROOT / "tools" / "compare_long.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    return tool


def test_the_plans_for_smollm2_are_what_they_say():
    tool, content = load_tool(), read_yaml(ROOT / "tools" / "plans" / "smollm2.yaml")
    shape = {"hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64}
    dense = dense_config(num_hidden_layers=30, max_position_embeddings=8192, **shape)
    for plan in content["plans"]:
        if plan["plan"] == "dense" or "run" in plan:
            continue
        photon = photon_config(dense, config := tool.settings_of(plan, content["all"]))
        grows = accounting.growing_bytes_per_token(photon) / accounting.dense_cache_bytes(dense, 1)
        if plan["plan"] == "dense-window":
            assert grows == 0 and photon.window == plan.get("photon.window", 512)
            continue
        budget = plan["photon.memory_budget"]
        assert budget * 0.75 < 100 * grows <= budget * (1 + 1e-6), plan
        assert count_cells(dense, config.photon) == sum(map(len, photon.memory_cells.values()))


@pytest.mark.slow
def test_rows_are_measured_once_with_the_cells_of_the_probe(tmp_path, monkeypatch, capsys):
    dense = tiny_checkpoint(tmp_path / "dense")
    for name in ("train", "heldout"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "text.txt").write_text(prose(len(name), 200))
    gradients = [[0.0, 0.0], [0.0, -3.0], [-1.0, 0.0], [0.0, 0.0]]
    probe = CellProbe(16, 4, {"text": ProbedLoss(1.0, 2.0, 0.0, gradients)})
    (tmp_path / "probe.json").write_text(probe.to_json())
    plans = [
        {"plan": "dense"},
        {"plan": "dense-window"},
        {"plan": "graft", "photon.memory_budget": 4.0},
    ]
    content = {"all": {"photon.window": 16, "train.seq_len": 64}, "plans": plans}
    (tmp_path / "plans.yaml").write_text(yaml.safe_dump(content))
    output = tmp_path / "rows.json"
    argv = ["--dense", dense, "--data", tmp_path / "train", "--held-out", tmp_path / "heldout"]
    argv += ["--probe", tmp_path / "probe.json", "--plans", tmp_path / "plans.yaml", "--output", output]
    argv += ["--lengths", LENGTH, "--sequences", 1, "--samples", 1]
    monkeypatch.setattr(sys, "argv", ["compare_long.py", *map(str, argv)])
    load_tool().main()
    whole, window, graft = rows = json.loads(output.read_text())["rows"]
    assert [row["kv_growing_percent"] for row in (whole, window)] == [100, 0] and output.with_suffix(".png").exists()
    # The best cell first; one in 4 bits takes 2 * (D / 2 + 2) bytes per unit of 2 tokens, of 4 layers * 2 heads.
    assert graft["cells"] == ["1:1"] and graft["kv_growing_percent"] == pytest.approx(100 * 6 / (4 * 2 * 32))
    constant = 4 * 2 * 32 * (4 + 16 + 3)  # sinks, the window, and what is kept of a unit that leaves it
    grown = 12 * ((LENGTH - 16) // 2)
    assert graft["kv_total_percent"] == pytest.approx(100 * (constant + grown) / (4 * 2 * 32 * LENGTH), rel=1e-3)
    assert all(row["length"] == LENGTH and row["tokens"] == 0 and 0 <= row["ruler"] <= 1 for row in rows)
    assert whole["ce_beyond_window"] != window["ce_beyond_window"] != graft["ce_beyond_window"]
    capsys.readouterr()
    load_tool().main()
    assert json.loads(output.read_text())["rows"] == rows and not capsys.readouterr().out.count("graft")

    # A run that is not there is said before anything is measured.
    content["plans"].append({"plan": "graft", "name": "trained", "run": str(tmp_path / "nothing")})
    (tmp_path / "plans.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(PhotonError, match="nothing holds no finished run: make it first"):
        load_tool().main()
    content["plans"].pop()
    (tmp_path / "plans.yaml").write_text(yaml.safe_dump(content))
    # Another output takes the rows over, and measures nothing again.
    argv[argv.index(output)] = other = tmp_path / "other.json"
    monkeypatch.setattr(sys, "argv", ["compare_long.py", *map(str, argv), "--add", str(output)])
    load_tool().main()
    assert json.loads(other.read_text())["rows"] == rows
    assert not capsys.readouterr().out.count("graft")
