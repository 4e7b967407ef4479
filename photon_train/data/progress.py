"""Progress bars on standard error: nothing is drawn where nobody watches."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn


def progress_bar(show: bool, detail: str) -> Progress:
    """A bar with description, count, `detail` (a rich template of the task's fields) and the remaining time.

    Args:
        show: False on all but the main process; a console that is no terminal shows none in any case.
        detail: Such as `"loss {task.fields[loss]:.3f}"`.
    """
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:,.0f}"),
        TextColumn(detail),
        TimeRemainingColumn(),
        console=console,
        disable=not (show and console.is_terminal),
    )
