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

from lib.plots import plot_inference

TOOLS = Path(__file__).resolve().parents[2] / "tools"
COLUMNS = {"device", "mode", "context", "batch", "system", "tokens_per_s", "decode_ratio", "tpm_kv", "tpm_total"}
COLUMNS |= {"kv_growing_bytes_per_token", "kv_constant_bytes", "ttft_s", "inter_token_s_p50", "inter_token_s_p95"}
COLUMNS |= {"inter_token_s_p99", "inter_token_s_by_phase", "peak_bytes", "read_bytes_per_s", "bandwidth_share"}


@pytest.mark.parametrize("order", ["turns", "alone"])
def test_systems_are_compared(order, tmp_path, monkeypatch, capsys):
    output = tmp_path / "smoke.json"
    arguments = ["--profile", "smoke", "--order", order, "--presets", "split", "--dense", "static", "window"]
    arguments += ["--longest-encoding", "60", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["bench_inference.py", *arguments])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(TOOLS / "bench_inference.py"), run_name="__main__")
    record = json.loads(output.read_text())
    assert record["claims"] == "ratios only" and record["order"] == order and record["copy_bytes_per_s"] > 0
    assert record["relative_errors"].keys() == {"dense-static", "dense-window", "split"}
    rows = {(row["mode"], row["batches"], row["system"]): row for row in record["rows"]}
    modes = {("multi-query", "equal"), ("decode-heavy", "equal")} | ({("long", "best")} if order == "alone" else set())
    assert rows.keys() == {(*mode, system) for mode in modes for system in record["relative_errors"]}
    for row in rows.values():
        assert row.keys() >= COLUMNS
        assert row["decode_ratio"] > 0 and (row["system"] != "dense-static" or row["decode_ratio"] == 1)
    split, dense, window = (rows["decode-heavy", "equal", name] for name in ("split", "dense-static", "dense-window"))
    assert len(split["inter_token_s_by_phase"]) == 16 and dense["inter_token_s_by_phase"] is None
    assert window["kv_growing_bytes_per_token"] == 0 < split["kv_growing_bytes_per_token"]
    assert split["ratios"]["kv_growing_bytes_per_token"] < 0.1
    # 70 tokens are more than the dense model was to encode.
    long = rows["multi-query", "equal", "dense-static"]
    assert long["ttft_s"] is None and long["tokens_per_s"] is None and dense["tokens_per_s"] > 0
    assert output.with_suffix(".png").exists()


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
        if (row["device"], row["batches"]) == ("H200", "best") and "aligned" not in row["system"]:
            shown = f"{row['tokens_per_s']:,.0f}" if row["system"] == "dense" else f"x{row['decode_ratio']:.1f}"
            assert f"| {shown} |" in text, row["system"]
