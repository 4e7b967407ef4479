"""The console that tables are printed on."""

from __future__ import annotations

import os

from rich.console import Console

# Columns of a log file or a pipe, whose width nobody knows: rich takes 80 and cuts tables there.
_LOG_WIDTH = 140


def make_console(stderr: bool = False) -> Console:
    """A console of the terminal's width, and wide where there is no terminal (``COLUMNS`` overrides)."""
    console = Console(stderr=stderr, highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console = Console(stderr=stderr, highlight=False, width=_LOG_WIDTH)
    return console
