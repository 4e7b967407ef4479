"""One run at a time in an output directory: a file that names the process that writes there."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

from photon_train.errors import PhotonError
from photon_train.files import hidden_sibling

FILE_NAME = ".lock"


class OutputLock:
    """The lock of an output directory.

    A process that was killed leaves it behind. On the host of that process this is seen, and the lock is taken over; of
    a process on another host nothing can be seen, so its lock stays until somebody deletes it.

    Args:
        directory: The output of a run.
    """

    def __init__(self, directory: Path) -> None:
        self.path = directory / FILE_NAME
        self._own: dict[str, Any] = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": _process(os.getpid())[1],
        }

    def check(self) -> None:
        """Check that no other run holds the lock.

        Raises:
            PhotonError: naming the process and its host, if one does, or may.
        """
        self._look()

    def acquire(self) -> None:
        """Take the lock; the directory must exist. Of several processes that try at the same time, one gets it.

        Raises:
            PhotonError: as `check`.
        """
        temporary = hidden_sibling(self.path)
        try:
            with open(temporary, "w", encoding="utf-8") as file:
                file.write(json.dumps(self._own) + "\n")
                file.flush()
                os.fsync(file.fileno())  # a power failure must not leave a lock that cannot be read
            while (found := self._look()) != self._own:
                if found is not None:
                    self._remove(found)
                try:
                    os.link(temporary, self.path)  # unlike a rename it fails where there is one; the content is there
                except FileExistsError:
                    continue
                except OSError:  # a file system without links
                    os.replace(temporary, self.path)
        finally:
            temporary.unlink(missing_ok=True)

    def release(self) -> None:
        """Delete the lock if it is this process's."""
        if self._read() == self._own:
            self.path.unlink(missing_ok=True)

    def _read(self) -> dict[str, Any] | None:
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
            return {"host": str(found["host"]), "pid": int(found["pid"]), "started": found["started"]}
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise PhotonError(f"{self.path} cannot be read: delete it if no run writes there") from error

    def _look(self) -> dict[str, Any] | None:
        """What the lock holds if this process may take it: nothing, its own, or that of a process that is gone."""
        found = self._read()
        if found is None or found == self._own:
            return found
        host, pid = found["host"], found["pid"]
        if host != self._own["host"]:
            raise PhotonError(
                f"output {self.path.parent} is locked by process {pid} on {host}, which cannot be seen from here: if "
                f"that run has ended, delete {self.path}; else give another directory"
            )
        is_alive, started = _process(pid)
        if is_alive and started == found["started"]:
            raise PhotonError(
                f"output {self.path.parent} is being written by another run, process {pid} on this machine: wait for "
                "it, or give another directory"
            )
        return found

    def _remove(self, seen: dict[str, Any]) -> None:
        """Delete the lock that was `seen`, and no other that has taken its place since."""
        aside = hidden_sibling(self.path)
        try:
            os.rename(self.path, aside)
        except FileNotFoundError:
            return
        if json.loads(aside.read_text(encoding="utf-8")) != seen:
            os.replace(aside, self.path)
        aside.unlink(missing_ok=True)


def _process(pid: int) -> tuple[bool, int | None]:
    """Whether a process of this machine runs, and when it began: a number may have passed on to another.

    The time is in the kernel's ticks since the machine started, which no clock changes; None where /proc has none.
    """
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False, None
    except PermissionError:  # somebody else's
        pass
    try:
        # What follows the name, which may hold anything: the state, and 18 fields later the time.
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        return fields[0] not in "ZX", int(fields[19])
    except (OSError, ValueError, IndexError):
        return True, None
