from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from photon_kernels._attention_config import choose_attention_config
from photon_kernels.aot import SHARED_LIMITS, ResourceReport, all_cases, compile_case


@pytest.fixture(scope="module")
def compilers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[subprocess.Popen, Path]]]:
    """A process per target, all at once, and the report that it writes. Here the kernels may be interpreted."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    environment.pop("TRITON_INTERPRET", None)
    running = {}
    for target in SHARED_LIMITS:
        folder = tmp_path_factory.mktemp(target)
        command = [sys.executable, "-m", "photon_kernels.aot", target, "--json", str(folder / "report.json")]
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**environment, "TRITON_CACHE_DIR": str(folder)},
        )
        running[target] = process, folder / "report.json"
    yield running
    for process, _ in running.values():
        process.kill()


@pytest.mark.slow
@pytest.mark.parametrize("target", SHARED_LIMITS)
def test_every_kernel_compiles_without_spills(target: str, compilers: dict) -> None:
    process, path = compilers[target]
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    reports = json.loads(path.read_text())["kernels"]
    assert reports == [json.loads(line) for line in output.splitlines()]
    kernels = {report["name"].split()[0] for report in reports}
    operations = {"window_decode", "paged_split", "paged_combine", "latent_weights", "latent_softmax", "latent_mix"}
    assert kernels == operations | {"latent_queries", "latent_outputs", "unit_pack", "chunker", "cache_append"}
    for report in reports:
        assert report["target"] == target
        assert 0 < report["registers"] <= 255, report
        assert report["spill_bytes"] == 0, report
        assert report["shared_bytes"] <= SHARED_LIMITS[target], report


@pytest.mark.parametrize("change, fits", [({}, True), ({"spill_bytes": 8}, False), ({"shared_bytes": 10**6}, False)])
def test_spills_and_too_much_shared_memory_do_not_fit(change: dict[str, int], fits: bool) -> None:
    report = ResourceReport("kernel", "sm_90", registers=9, spill_bytes=0, shared_bytes=9, num_warps=4, num_stages=1)
    assert dataclasses.replace(report, **change).fits == fits


def test_compiling_interpreted_kernels_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(iter(all_cases()))
    if os.environ.get("TRITON_INTERPRET") != "1":
        monkeypatch.setattr("triton.JITFunction", type(None))
    with pytest.raises(RuntimeError, match="unset TRITON_INTERPRET"):
        compile_case(case, "sm_90")


@pytest.mark.parametrize("num_keys", [0, 1, 8, 16, 72, 300, 5000])
@pytest.mark.parametrize("group", [1, 8, 20, 64])
@pytest.mark.parametrize("head_dim", [8, 16, 80, 128])
@pytest.mark.parametrize("element_size", [2, 4])
def test_tiles_are_valid_and_fit(num_keys: int, group: int, head_dim: int, element_size: int) -> None:
    config = choose_attention_config(num_keys, group, head_dim, element_size)
    for block in (config.block_n, config.block_m, config.block_d):
        assert block >= 16 and block & (block - 1) == 0
    assert config.block_m >= min(group, 32) and config.block_d >= head_dim
    assert config.num_stages >= 1
    # Keys and values of every tile in flight.
    assert 2 * config.num_stages * config.block_n * config.block_d * element_size <= min(SHARED_LIMITS.values())
