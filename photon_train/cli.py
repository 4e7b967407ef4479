"""How recipes and tools end: the exit status, and one line for what a user can fix."""

from __future__ import annotations

import errno
import os
import sys
import time
from collections.abc import Callable
from typing import NoReturn

from photon_train.errors import PhotonError

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_WAIT = 10.0  # seconds; launchers look after their processes more often


def main_wrapper(function: Callable[[], object]) -> NoReturn:
    """Run a recipe's main function and exit: 0 on success, 2 with one line on stderr for a `PhotonError`, a full disk.

    Most errors are met by all processes, and the first on each machine speaks: the others wait for so long that the
    launcher has ended them. What one of them meets alone (a hub that did not answer it) it then says itself.
    """
    try:
        function()
    except (PhotonError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in _DISK_FULL:
            raise
        place = ""
        if os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(_WAIT)
            place = f" (process {os.environ.get('RANK', os.environ['LOCAL_RANK'])})"
        print(f"error{place}: {_one_line(error)}", file=sys.stderr)
        raise SystemExit(2) from None
    raise SystemExit(0)


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError):
        name = error.filename or "a file"
        return f"{name} cannot be written: {error.strerror}; free some, then start the run again with --resume"
    return " ".join(str(error).split())
