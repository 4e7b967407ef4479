"""Which checkpoint a run goes on from, and which it removes, without a training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from photon_train.errors import PhotonError
from photon_train.files import hidden_sibling
from photon_train.manifest import write_manifest
from photon_train.training import checkpoint
from photon_train.training.checkpoint import TrainingState, latest_checkpoint, load_checkpoint, usable_checkpoint


def checkpoints(directory: Path, *steps: int) -> list[Path]:
    """Complete checkpoints of one file each."""
    paths = [directory / f"step_{step:06d}" for step in steps]
    for path in paths:
        path.mkdir(parents=True)
        (path / "state").write_text("whole")
        write_manifest(path, "checkpoint", {}, {})
    return paths


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_the_newest_whole_one_is_used_and_older_than_the_newest_few_are_removed(tmp_path, caplog):
    paths = checkpoints(tmp_path, 1, 2, 3, 4)
    (paths[3] / "state").write_text("other")
    assert latest_checkpoint(tmp_path) == paths[3]
    assert usable_checkpoint(Accelerator(), tmp_path, keep=2) == paths[2]
    assert "step_000004" in caplog.text and "passed over" in caplog.text
    assert names(tmp_path) == ["step_000002", "step_000003", "step_000004"], "the damaged one is not counted"


def test_steps_are_compared_as_numbers(tmp_path):
    paths = checkpoints(tmp_path, 999_999, 1_000_000)
    assert latest_checkpoint(tmp_path) == paths[1]
    assert usable_checkpoint(Accelerator(), tmp_path, keep=1) == paths[1] and names(tmp_path) == ["step_1000000"]


def test_what_is_not_complete_is_no_checkpoint(tmp_path):
    paths = checkpoints(tmp_path, 1, 2)
    (paths[1] / "manifest.json").unlink()
    (tmp_path / "step_last").mkdir()
    hidden_sibling(tmp_path / "step_000003").mkdir()
    assert latest_checkpoint(tmp_path) == paths[0] == usable_checkpoint(Accelerator(), tmp_path, keep=1)
    assert names(tmp_path) == ["step_000001", "step_000002", "step_last"], "leftovers of killed processes are removed"


def test_without_a_whole_one_a_run_does_not_silently_start_anew(tmp_path):
    assert usable_checkpoint(Accelerator(), tmp_path / "none", keep=1) is None
    for path in checkpoints(tmp_path, 1, 2):
        (path / "state").unlink()
    with pytest.raises(PhotonError, match="no checkpoint in .* is whole: .*step_000001/state is missing; remove"):
        usable_checkpoint(Accelerator(), tmp_path, keep=1)


def test_other_processes_go_on_with_random_numbers_of_their_own(tmp_path, monkeypatch):
    """Set apart by seed and step, and from those that the run began with; as many processes keep the stored ones."""
    monkeypatch.setattr(checkpoint, "_load_state", lambda accelerator, path: None)

    def drawn(step: int, seed: int, num_processes: int = 2) -> float:
        set_seed(seed, device_specific=True)
        load_checkpoint(Accelerator(), tmp_path, TrainingState(step=step, num_processes=num_processes), seed)
        return torch.rand(()).item()

    set_seed(0, device_specific=True)
    began = torch.rand(()).item()
    assert drawn(3, 0, num_processes=1) == began
    assert drawn(3, 0) == drawn(3, 0)
    assert len({began, drawn(0, 0), drawn(3, 0), drawn(4, 0), drawn(3, 1)}) == 5
