"""Kill -9 at random moments: the same command goes on from the newest complete checkpoint, bit for bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from photon_train.files import is_leftover
from photon_train.manifest import verify_manifest
from photon_train.training.checkpoint import checkpoint_dir

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("killed_runs.py")
KILLS = 20


def _numbers(output: Path) -> list[dict]:
    """The run's records without what depends on the clock."""
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if "per_second" not in key} for record in records]


@pytest.mark.slow
def test_twenty_kills_change_nothing(tmp_path):
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in (".", "kernels", "tests/support")),
    }
    command = [sys.executable, str(SCRIPT), str(tmp_path), str(KILLS), "0"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    logs = "\n".join(log.read_text()[-1500:] for log in tmp_path.glob("*.log"))
    assert done.returncode == 0, done.stderr[-2000:] + logs
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["kills"] == KILLS and report["runs"] >= 2
    assert report["half_written"] >= 3, "no kill met a checkpoint that was being written: draw other moments"
    straight = checkpoint_dir(tmp_path / "straight", "photon")
    for number in range(report["runs"]):
        output = tmp_path / str(number)
        assert _numbers(output) == _numbers(tmp_path / "straight")
        checkpoints = checkpoint_dir(output, "photon")
        assert sorted(p.name for p in checkpoints.iterdir()) == sorted(p.name for p in straight.iterdir())
        assert not [path for path in output.iterdir() if is_leftover(path)]
        for checkpoint in checkpoints.iterdir():
            verify_manifest(checkpoint)
            weights, expected = (load_file(d / checkpoint.name / "model.safetensors") for d in (checkpoints, straight))
            assert weights.keys() == expected.keys()
            assert all(weights[name].equal(expected[name]) for name in expected)
