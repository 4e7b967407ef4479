from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from photon_kernels._attention_config import choose_attention_config
from photon_kernels.aot import SHARED_LIMITS, all_cases, compile_case


@pytest.mark.slow
@pytest.mark.parametrize("target", SHARED_LIMITS)
def test_every_kernel_compiles_without_spills(target: str, tmp_path: Path) -> None:
    """In a process of its own: here the kernels may be interpreted."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-m", "photon_kernels.aot", target], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    reports = [json.loads(line) for line in done.stdout.splitlines()]
    kernels = {report["name"].split()[0] for report in reports}
    assert kernels == {"window_decode", "summary_split", "summary_combine", "chunker"}
    for report in reports:
        assert report["target"] == target
        assert 0 < report["registers"] <= 255, report
        assert report["spill_bytes"] == 0, report
        assert report["shared_bytes"] <= SHARED_LIMITS[target], report


def test_compiling_interpreted_kernels_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(iter(all_cases()))
    if os.environ.get("TRITON_INTERPRET") != "1":
        monkeypatch.setattr("triton.JITFunction", type(None))
    with pytest.raises(RuntimeError, match="unset TRITON_INTERPRET"):
        compile_case(case, "sm_90")


@pytest.mark.parametrize("num_entries", [0, 1, 8, 16, 72, 300, 5000])
@pytest.mark.parametrize("group", [1, 8, 20, 64])
@pytest.mark.parametrize("head_dim", [8, 16, 80, 128])
@pytest.mark.parametrize("element_size", [2, 4])
def test_tiles_are_valid_and_fit(num_entries: int, group: int, head_dim: int, element_size: int) -> None:
    config = choose_attention_config(num_entries, group, head_dim, element_size)
    for block in (config.block_n, config.block_m, config.block_d):
        assert block >= 16 and block & (block - 1) == 0
    assert config.block_m >= min(group, 32) and config.block_d >= head_dim
    assert config.num_stages >= 1
    # Keys and values of every tile in flight.
    assert 2 * config.num_stages * config.block_n * config.block_d * element_size <= min(SHARED_LIMITS.values())
