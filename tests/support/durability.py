"""What a power failure would leave: files, and names in directories, as they were when they were last synced.

    disk = Disk(monkeypatch)
    write(path)
    assert not disk.lost(path)

Without `fsync` a file system may keep a rename and lose the content of the file, or keep neither. So what is renamed
into place must have been synced before, whole, and the directory afterwards.
"""

from __future__ import annotations

import os
from pathlib import Path

from photon_train.files import is_leftover


class Disk:
    """Records `os.fsync` and `os.replace` of this process from now on.

    Attributes:
        early: What was renamed into place before it had been synced, by the new name.
    """

    def __init__(self, monkeypatch) -> None:
        self._files: set[tuple[int, int, int]] = set()
        self._names: dict[int, dict[str, int]] = {}
        self._fsync, self._replace = os.fsync, os.replace
        self.early: list[str] = []
        monkeypatch.setattr(os, "fsync", self._record_sync)
        monkeypatch.setattr(os, "replace", self._record_replace)

    def lost(self, path: Path) -> list[str]:
        """What of `path`, and of all in it, is not on the disk; its own name in its directory must be."""
        own = self._names.get(path.parent.stat().st_ino, {})
        missing = [] if own.get(path.name) == path.stat().st_ino else [f"name {path}"]
        return missing + self._unsynced(path)

    def _unsynced(self, path: Path) -> list[str]:
        missing = []
        for one in [path, *(path.rglob("*") if path.is_dir() else ())]:
            if one.is_dir():
                synced = self._names.get(one.stat().st_ino, {})
                missing += [f"name {one / name}" for name, inode in _names(one).items() if synced.get(name) != inode]
            elif _state(one.stat()) not in self._files:
                missing.append(f"content {one}")
        return missing

    def _record_sync(self, handle: int) -> None:
        self._fsync(handle)
        status = os.fstat(handle)
        if os.path.isdir(f"/dev/fd/{handle}"):
            self._names[status.st_ino] = _names(handle)
        else:
            self._files.add(_state(status))

    def _record_replace(self, source, target, **settings) -> None:
        if not is_leftover(Path(target)):  # what gives way keeps the state it had
            self.early += [f"{missing} -> {target}" for missing in self._unsynced(Path(source))]
        self._replace(source, target, **settings)


def _state(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_ino, status.st_size, status.st_mtime_ns


def _names(directory: Path | int) -> dict[str, int]:
    with os.scandir(directory) as entries:
        return {entry.name: entry.inode() for entry in entries if not is_leftover(Path(entry.name))}
