"""The benchmark of decoding and the suite for GPUs, at sizes that say nothing about speed."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lib.cases import Prefill
from lib.plots import plot_inference
from lib.prefill import PrefillBench
from photon_train.errors import PhotonError
from photon_train.inference.runner import Runner

TOOLS = Path(__file__).resolve().parents[2] / "tools"
COLUMNS = {"device", "mode", "context", "batch", "system", "tokens_per_s", "decode_ratio", "tpm_kv", "tpm_total"}
COLUMNS |= {"kv_growing_bytes_per_token", "kv_constant_bytes", "ttft_s", "inter_token_s_p50", "inter_token_s_p95"}
COLUMNS |= {"inter_token_s_p99", "inter_token_s_by_phase", "peak_bytes", "read_bytes_per_s", "bandwidth_share"}


def run(monkeypatch, output: Path, *arguments: str) -> dict:
    """The record of a smoke run."""
    words = ["bench_inference.py", "--profile", "smoke", "--output", str(output), *arguments]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(TOOLS / "bench_inference.py"), run_name="__main__")
    return json.loads(output.read_text())


@pytest.mark.parametrize(("order", "preset", "unit"), [("turns", "split", 16), ("alone", "graft", 8)])
def test_systems_are_compared(order, preset, unit, tmp_path, monkeypatch):
    output = tmp_path / "smoke.json"
    arguments = ["--order", order, "--presets", preset, "--dense", "static", "window", "--longest-encoding", "60"]
    record = run(monkeypatch, output, *arguments, "--no-prefill")
    assert record["claims"] == "ratios only" and record["order"] == order and record["copy_bytes_per_s"] > 0
    assert "prefill" not in record and record["clock"] == "CPU time of one thread"
    assert record["relative_errors"].keys() == {"dense-static", "dense-window", preset}
    rows = {(row["mode"], row["batches"], row["system"]): row for row in record["rows"]}
    modes = {("multi-query", "equal"), ("decode-heavy", "equal")} | ({("long", "best")} if order == "alone" else set())
    assert rows.keys() == {(*mode, system) for mode in modes for system in record["relative_errors"]}
    for row in rows.values():
        assert row.keys() >= COLUMNS
        assert row["decode_ratio"] > 0 and (row["system"] != "dense-static" or row["decode_ratio"] == 1)
    photon, dense, window = (rows["decode-heavy", "equal", name] for name in (preset, "dense-static", "dense-window"))
    assert len(photon["inter_token_s_by_phase"]) == unit and dense["inter_token_s_by_phase"] is None
    assert window["kv_growing_bytes_per_token"] == 0 < photon["kv_growing_bytes_per_token"]
    assert photon["ratios"]["kv_growing_bytes_per_token"] < 0.1
    # 70 tokens are more than the dense model was to encode.
    long = rows["multi-query", "equal", "dense-static"]
    assert long["ttft_s"] is None and long["tokens_per_s"] is None and dense["tokens_per_s"] > 0
    assert output.with_suffix(".png").exists()


def test_prefill_is_compared(tmp_path, monkeypatch, capsys):
    record = run(monkeypatch, tmp_path / "smoke.json", "--no-decode")["prefill"]
    assert record["layers"] == 2 and record["memory_layers"] == [1] and record["window"] == 64
    assert record["memory_cells"] == ["1:0", "1:1", "1:2", "1:3"] and record["memory_bits"] == 16
    errors = record["relative_errors"]
    assert errors["graft as the dense model"] < 1e-5 and errors["graft under the engine"] < 1e-5
    dense, graft = record["rows"]
    assert (dense["system"], graft["system"]) == ("dense-sdpa", "graft") and dense["prefill_ratio"] == 1
    assert graft["prefill_ratio"] == dense["seconds"][0] / graft["seconds"][0] and graft["context"] == 70
    assert "1 turns of 70 tokens will take" in capsys.readouterr().out


@torch.no_grad()
def test_a_graft_that_is_not_the_dense_model_is_not_timed():
    bench = PrefillBench(Prefill("demo", (70,), 1, 2))
    linear = bench.graft.model.layers[0].mlp.down_proj
    linear.weight = torch.nn.Parameter(1.5 * linear.weight)  # its weights are the dense model's own
    with pytest.raises(PhotonError, match="graft as the dense model computes something else"):
        bench.check()


@torch.no_grad()
def test_an_engine_that_differs_from_one_pass_is_not_timed(monkeypatch):
    decode = Runner.decode
    monkeypatch.setattr(Runner, "decode", lambda self, work: 1.001 * decode(self, work))
    with pytest.raises(PhotonError, match="graft under the engine computes something else"):
        PrefillBench(Prefill("demo", (70,), 1, 2)).check()


def test_each_context_is_drawn_once(tmp_path):
    row = {"mode": "long", "system": "dense", "decode_ratio": 1.0}
    cases = [(4096, 8, "equal"), (4096, 32, "best"), (8192, 8, "equal"), (8192, 1, "equal")]
    rows = [row | {"context": context, "batch": batch, "batches": kind} for context, batch, kind in cases]
    plot_inference([*rows, rows[0] | {"decode_ratio": None}], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_the_suite_for_gpus_asks_for_what_there_is():
    """Its shell is sound, and every file and option that it names exists (`--smoke` runs it without a GPU)."""
    suite = TOOLS / "gpu_suite.sh"
    subprocess.run(["bash", "-n", str(suite)], check=True)
    words = shlex.split(suite.read_text().replace("\\\n", " "), comments=True)
    assert "bench_inference.py" in " ".join(words)
    options: set[str] = set()
    for word in words:
        if word.startswith("tests/"):
            assert (TOOLS.parent / word).exists()
        elif word.startswith("tools/") and word.endswith(".py"):
            options = set(re.findall(r'add_argument\(\s*"(--[\w-]+)"', (TOOLS.parent / word).read_text())) | {"--help"}
        elif word in ("step", "-m", "else"):
            options = set()
        elif word.startswith("--") and options:
            assert word in options, word


def test_the_guide_has_the_benchmarks_numbers():
    text = (TOOLS.parent / "docs" / "inference.md").read_text(encoding="utf-8")
    results = TOOLS.parent / "benchmarks" / "inference"
    for row in json.loads((results / "cpu-demo.json").read_text())["rows"]:
        if row["system"] != "dense-static" and row["batch"] > 1:
            assert f"| {row['decode_ratio']:.2f} |" in text, row["system"]
    for row in json.loads((results / "roofline.json").read_text())["rows"]:
        if (row["device"], row["batches"]) == ("H200", "best"):
            shown = f"{row['tokens_per_s']:,.0f}" if row["system"] == "dense" else f"x{row['decode_ratio']:.1f}"
            assert f"| {shown} |" in text, row["system"]
