"""How recipes and tools end: the exit status, and one line for what a user can fix."""

from __future__ import annotations

import errno
import io
import os
import re
import select
import sys
import time
import traceback
from collections.abc import Callable
from typing import NoReturn

from photon_train.errors import PhotonError

_DISK_FULL = "cannot be written: {}; free some, then start the run again with --resume"
_FORBIDDEN = "cannot be used: {}; allow it, or give another place"
# What a user can do something about on the machine, and what.
_FIXES = {
    errno.ENOSPC: _DISK_FULL,
    errno.EDQUOT: _DISK_FULL,
    errno.EROFS: _FORBIDDEN,
    errno.EACCES: _FORBIDDEN,
}
_SIGPIPE_STATUS, _SIGINT_STATUS = 128 + 13, 128 + 2
# What torch's and DeepSpeed's allocators of main memory, and the driver, say.
_ALLOCATION = re.compile(r"can't allocate memory|not enough memory|CUDA out of memory|CUDA error: out of memory")
_WAIT = 10.0  # seconds; launchers look after their processes more often


def main_wrapper(function: Callable[[], object]) -> NoReturn:
    """Run a recipe's main function and exit: 0 on success, 2 with one line on stderr for a `PhotonError`, a full disk
    or one that is not to be written.

    What stdout cannot write is written by its number (``\\u2014``); where nobody reads it any more (``| head``)
    the program ends without a word, with the status that the signal would give it; where it is interrupted (Ctrl-C),
    with one.

    Most errors are met by all processes, and the first on each machine speaks: the others wait for so long that the
    launcher has ended them. What one of them meets alone (a hub that did not answer it) it then says itself.
    """
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        try:
            function()
        except SystemExit:  # after --help
            sys.stdout.flush()
            raise
        sys.stdout.flush()
    except BrokenPipeError:
        if not _nobody_reads():
            raise
        raise SystemExit(_SIGPIPE_STATUS) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(_SIGINT_STATUS) from None
    except (PhotonError, OSError, MemoryError, RuntimeError) as error:
        if isinstance(error, OSError) and error.errno not in _FIXES or _is_other(error):
            raise
        place = ""
        if os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(_WAIT)
            place = f" (process {os.environ.get('RANK', os.environ['LOCAL_RANK'])})"
        print(f"error{place}: {_one_line(error)}", file=sys.stderr)
        raise SystemExit(2) from None
    raise SystemExit(0)


def _nobody_reads() -> bool:
    """Whether the pipe that broke is stdout's; what is left for it is then thrown away, or Python's own end would fail.

    The other pipes of a program break for reasons that are worth a traceback.
    """
    try:
        descriptor = sys.stdout.fileno()
    except (OSError, ValueError):  # no file of the system
        return False
    poll = select.poll()
    poll.register(descriptor, 0)
    if not any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
    return True


def _is_other(error: Exception) -> bool:
    """Whether it is a RuntimeError that does not say that memory ran out.

    torch has a class for a GPU's memory alone, and none of it is imported here.
    """
    if not isinstance(error, RuntimeError) or isinstance(error, PhotonError):
        return False
    return type(error).__name__ != "OutOfMemoryError" and _ALLOCATION.search(str(error)) is None


def _one_line(error: Exception) -> str:
    if isinstance(error, MemoryError | RuntimeError) and not isinstance(error, PhotonError):
        said = str(error).strip().split("\n")[0] or "no more can be allocated"
        frame = traceback.extract_tb(error.__traceback__)[-1]
        return (
            f"out of memory: {said} ({frame.filename}, line {frame.lineno}). Lower what is held at a time (of a run "
            "train.batch_size, train.seq_len, lora.rank; --dry-run says what it takes), or free memory"
        )
    if isinstance(error, OSError):
        return f"{error.filename or 'a file'} {_FIXES[error.errno].format(error.strerror)}"
    return " ".join(str(error).split())
