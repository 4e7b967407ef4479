"""How long work will take, said once its first part has been timed, and how far it is."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from photon_train.data.progress import progress_bar


@contextmanager
def announced(description: str, sentence: str) -> Iterator[Callable[[float, float], None]]:
    """Show a progress bar, and say at the first report how long all of the work will take.

    Args:
        description: Stands before the bar.
        sentence: What is being done; the duration is appended.

    Yields:
        The function to report to, ``(done, total)`` in any unit.
    """
    began = time.perf_counter()
    with progress_bar(True, "%") as bar:
        task = bar.add_task(description, total=100)

        def report(done: float, total: float) -> None:
            if not bar.tasks[task].completed:
                bar.console.print(f"{sentence}: about {_duration((time.perf_counter() - began) * total / done)}")
            bar.update(task, completed=100 * done / total)

        yield report


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{max(1, seconds):.0f} s"
