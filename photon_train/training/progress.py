"""What the main process shows and keeps during training: a progress bar, log lines and `metrics.jsonl`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from photon_train.errors import PhotonError
from photon_train.files import atomic_write_text, make_directory

METRICS_FILE = "metrics.jsonl"
_SHORT = {
    "train/loss": ("loss", ".4f"),
    "train/ce": ("ce", ".4f"),
    "train/distill": ("kl", ".4f"),
    "train/distill_hidden": ("hidden", ".4f"),
    "train/consistency": ("consistency", ".4f"),
    "train/learning_rate": ("lr", ".2e"),
    "train/grad_norm": ("grad", ".3f"),
    "train/tokens_per_second": ("tok/s", ",.0f"),
    "eval/ce": ("held-out ce", ".4f"),
}


class MetricsLog:
    """The records of one training, in `<output>/metrics.jsonl` beside those of other trainings.

    Records of an earlier attempt at the same training that lie after `start_step` are removed.

    Args:
        output_dir: Directory of the run.
        name: Name of the training.
        start_step: Step that the training continues from; 0 starts it anew.
        writes: Whether this process is the one that writes.
    """

    def __init__(self, output_dir: Path, name: str, start_step: int, writes: bool) -> None:
        self.path, self.name, self.writes = output_dir / METRICS_FILE, name, writes
        self.history: list[dict[str, Any]] = []
        if not writes:
            return
        make_directory(output_dir)
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True) if self.path.exists() else []
        kept = []
        for line in lines:
            if not line.endswith("\n"):
                continue  # a process was killed while writing it
            record = json.loads(line)
            if record["name"] != name:
                kept.append(line)
            elif start_step and record["step"] <= start_step:
                kept.append(line)
                self.history.append(record)
        atomic_write_text(self.path, "".join(kept))

    def add(self, record: dict[str, Any]) -> None:
        """Append one record (`step` and metrics).

        Raises:
            PhotonError: if it cannot be written; what a full disk leaves of a line is dropped when the run resumes.
        """
        record = {"name": self.name, **record}
        self.history.append(record)
        if self.writes:
            try:
                with open(self.path, "a", encoding="utf-8") as file:
                    file.write(json.dumps(record) + "\n")
                    file.flush()
                    os.fsync(file.fileno())  # a checkpoint that comes later goes on from these records
            except OSError as error:
                raise PhotonError(
                    f"{self.path} cannot be written ({error.strerror}): see that the disk has room, then start the run "
                    "again with --resume; checkpoints are whole"
                ) from error


class TrainingProgress:
    """A progress bar with log lines above it; plain lines where the output is no terminal; nothing if not `shown`."""

    def __init__(self, name: str, max_steps: int, start_step: int, shown: bool) -> None:
        self.name, self.max_steps = name, max_steps
        self.console = Console(quiet=not shown, highlight=False)
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not shown or not self.console.is_terminal,
            transient=True,
        )
        self.task = self.bar.add_task(f"training {name}", total=max_steps, completed=start_step)

    def __enter__(self) -> TrainingProgress:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def advance(self, step: int) -> None:
        """Show that `step` optimiser steps are done."""
        self.bar.update(self.task, completed=step)

    def show(self, record: dict[str, Any], seconds_left: float | None = None) -> None:
        """Print one line of metrics."""
        parts = [
            f"{short} {record[key]:{form}}" for key, (short, form) in _SHORT.items() if record.get(key) is not None
        ]
        if seconds_left is not None:
            minutes, seconds = divmod(round(seconds_left), 60)
            parts.append(f"ETA {minutes}:{seconds:02d}")
        self.console.print(f"{self.name} step {record['step']}/{self.max_steps}  " + "  ".join(parts), soft_wrap=True)
