"""Progress where nobody watches a terminal."""

from __future__ import annotations

import pytest

from photon_train.data import progress


def run(steps: int, show: bool = True) -> None:
    with progress.progress_bar(show, "of 9 steps  loss {task.fields[loss]:.2f}") as bar:
        task = bar.add_task("pretraining", total=9, loss=0.0)
        for step in range(steps):
            bar.update(task, advance=1, loss=step / 2)


def test_a_log_gets_one_line_per_interval(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    clock = iter(range(0, 1000, 5))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    run(9)
    lines = capsys.readouterr().err.splitlines()
    # The clock is read at the start (0 s) and after every step (5 s each): a line is due at 15, 30 and 45 s.
    assert [line.split()[0] for line in lines] == ["pretraining"] * 3
    assert [line.split("loss ")[1].split()[0] for line in lines] == ["1.00", "2.50", "4.00"]
    assert "3 of 9 steps" in lines[0]


def test_other_processes_are_silent(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    clock = iter(range(0, 10000, 50))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    run(9, show=False)
    assert capsys.readouterr() == ("", "")
