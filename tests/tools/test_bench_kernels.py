"""The kernel benchmark: right before it is timed, and never timed in the interpreter."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lib import kernel_cases
from photon_train.errors import PhotonError

ROOT = Path(__file__).resolve().parents[2]
spec = importlib.util.spec_from_file_location("bench_kernels", ROOT / "tools" / "bench_kernels.py")
tool = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = tool  # dataclasses look their module up
spec.loader.exec_module(tool)

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="describes a machine without a GPU")


@without_gpu
@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_every_case_is_checked(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench_kernels.py", "--check"])
    tool.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(list(tool.cases(small=True)))
    timed = {build.func for build in tool.cases(small=False)}
    assert {build.func for build in tool.cases(small=True)} == timed


def test_a_wrong_kernel_is_not_timed(monkeypatch):
    monkeypatch.setattr(tool, "microseconds", lambda function: pytest.fail("timed"))
    case = replace(kernel_cases.chunker_case(2, 16, 2), run=lambda: torch.zeros(2, 16, device=kernel_cases.device()))
    with pytest.raises(PhotonError, match=r"chunker \(rows=2 C=2 d=16\) is off by 1.0e\+00"):
        tool.row_of(case, bandwidth=1e12)


def test_rows_give_bytes_per_second_and_ratios(monkeypatch, tmp_path):
    took = iter([2.0, 8.0])
    monkeypatch.setattr(tool, "microseconds", lambda function: next(took))
    case = kernel_cases.chunker_case(2, 16, 2)
    row = tool.row_of(case, bandwidth=1e9)
    assert row["bytes_per_s"] == case.nbytes / 2e-6 and row["copy_share"] == round(row["bytes_per_s"] / 1e9, 3)
    assert row["times index, linear"] == 4.0
    tool.write_rows(tmp_path / "kernels.json", [row], copy_bytes_per_s=10**9)
    assert json.loads((tmp_path / "kernels.json").read_text())["rows"] == [row]


@without_gpu
def test_the_interpreter_is_not_timed(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench_kernels.py"])
    with pytest.raises(PhotonError, match="give --check"):
        tool.main()


@without_gpu
def test_the_fastest_tiles_of_all_cases_go_to_the_table(monkeypatch, tmp_path):
    tried = [{"block_n": 64, "num_warps": 4, "num_stages": 2}, {"block_n": 32, "num_warps": 4, "num_stages": 2}]
    monkeypatch.setattr(tool, "candidates", lambda default: iter(tried))
    # Per case: the plain choice, then the two others; the second is faster once and slower once.
    took = iter([10.0, 9.0, 8.0, 10.0, 8.0, 12.0])
    monkeypatch.setattr(tool, "microseconds", lambda function: function() is None or next(took))
    path = tmp_path / "tiles.json"
    path.write_text('{"devices": {"another": {}}}')
    cases = [lambda: kernel_cases.window_case(2, (4, 2, 16), 40)] * 2
    tool.tune(iter(cases), path, budget_seconds=60)
    chosen = {"window_decode slots=40 queries=2 dim=16 bytes=2": tried[0]}
    assert json.loads(path.read_text()) == {"devices": {"another": {}, "cpu": chosen}}
