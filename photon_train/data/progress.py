"""Progress on standard error: a bar on a terminal, else a line now and then (logs of batch systems, CI)."""

from __future__ import annotations

import logging
import os
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TaskID, TextColumn, TimeRemainingColumn

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_LINES = 15.0


class _Progress(Progress):
    """A rich progress bar that writes lines where the console is no terminal."""

    def __init__(self, *columns: ProgressColumn, console: Console, shown: bool) -> None:
        super().__init__(*columns, console=console, disable=not (shown and console.is_terminal))
        self._lines = shown and not console.is_terminal
        self._last_line = time.monotonic()

    def update(self, task_id: TaskID, **changes: Any) -> None:
        super().update(task_id, **changes)
        now = time.monotonic()
        if self._lines and now - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = now
            self.console.print(self.make_tasks_table([self._tasks[task_id]]))


def progress_bar(show: bool, detail: str) -> Progress:
    """A bar with description, count, `detail` (a rich template of the task's fields) and the remaining time.

    Args:
        show: False on all but the main process.
        detail: Such as `"loss {task.fields[loss]:.3f}"`.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        console.width = 120  # a file has no width: one line per report
    return _Progress(
        TextColumn("{task.description}"),
        BarColumn(20),
        TextColumn("{task.completed:,.0f}"),
        TextColumn(detail),
        TimeRemainingColumn(),
        console=console,
        shown=show,
    )


def warn(line: str) -> None:
    """Log a warning about the text once a run: every process reads it, and all would say the same."""
    if os.environ.get("RANK", "0") == "0":
        logger.warning("%s", line)
