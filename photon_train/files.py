"""Writing that is complete or invisible, the checks that can be made before it, and where it may be cached."""

from __future__ import annotations

import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from photon_train.errors import PhotonError

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40, "B": 1}
_LEFTOVER = re.compile(r"\..+\.[0-9a-f]{12}")  # see `hidden_sibling`
_SPARE_BYTES = 64 * 2**20  # tokenizer, configuration, code, and what else wants to be written meanwhile


def default_cache_dir() -> Path:
    """`$PHOTON_TRAIN_CACHE`, else `$XDG_CACHE_HOME/photon-train`, else `~/.cache/photon-train`."""
    chosen = os.environ.get("PHOTON_TRAIN_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "photon-train"


def parse_size(size: str | int, key: str = "size") -> int:
    """Bytes of ``5GB``, ``200 MiB``, ...; a whole number that is no text counts bytes.

    Raises:
        PhotonError: naming `key`, if the text is no size greater than 0, or has no unit.
    """
    if isinstance(size, int):
        return size
    found = re.fullmatch(r"(\d+(?:\.\d+)?) *([KMGT]?I?B)", size.strip().upper())
    result = int(float(found[1]) * _UNITS.get(found[2], 0)) if found else 0
    if result < 1:
        raise PhotonError(f"{key} is {size!r}, which is no size: write for example 5GB or 200MiB")
    return result


def expand_path(path: str) -> str:
    """`path` with the home directory in place of ``~`` or ``~user``, as shells do where they see one.

    They see none in YAML and after ``--key=``.

    Raises:
        PhotonError: if there is no such user.
    """
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise PhotonError(f"{path}: this machine has no user {path.split('/')[0][1:]!r}: write ./{path} for a file")
    return expanded


def check_can_write(directory: Path, num_bytes: int, what: str) -> None:
    """Check that a new `directory` can take `num_bytes`; costs nothing, so callers may ask early.

    Args:
        what: Names what is to be written, for the message.

    Raises:
        PhotonError: if the directory exists and is not empty, is a file, or the disk has too little space.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise PhotonError(f"{directory} is not empty: give a new output directory, or delete it")
    parent = next(path for path in directory.absolute().parents if path.exists())
    needed, free = num_bytes + _SPARE_BYTES, shutil.disk_usage(parent).free
    if needed > free:
        raise PhotonError(
            f"{parent} has {free / 1e9:.1f} GB free, {what} needs {needed / 1e9:.1f} GB: free some, or give an output "
            "directory on another disk"
        )


def atomic_write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` (UTF-8) to `path`, or leave what was there.

    Raises:
        OSError: if the directory cannot be written; `path` is then as it was.
    """
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary sibling of `path` to write; it takes the place of `path` on success, else `path` stays.

    The content is on the disk before the name is, and the name before this returns: a power failure leaves the old file
    or the new one, never a part.
    """
    path = Path(path)
    temporary = hidden_sibling(path)
    try:
        yield temporary
        _sync_file(temporary)
        os.replace(temporary, path)
        _sync_directory(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def atomic_directory(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary sibling of `path`; rename it to `path` on success, remove it on failure.

    An existing `path` is replaced only once the new directory is complete and on the disk.
    """
    path = Path(path)
    make_directory(path.parent)
    temporary, old = hidden_sibling(path), hidden_sibling(path)
    temporary.mkdir()
    try:
        yield temporary
        sync_files(temporary)
        try:
            if path.exists():
                os.replace(path, old)
            os.replace(temporary, path)
        except BaseException:
            if old.exists():
                os.replace(old, path)
            raise
        _sync_directory(path.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


def sync_files(directory: Path) -> None:
    """Bring every file in `directory`, and the directory itself, to the disk."""
    for path in directory.rglob("*"):
        if path.is_file():
            _sync_file(path)
        elif path.is_dir():
            _sync_directory(path)
    _sync_directory(directory)


def make_directory(directory: Path) -> None:
    """Create `directory` where it is missing, with its parents, so that their names survive a power failure."""
    missing = [path for path in (directory, *directory.parents) if not path.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    for path in reversed(missing):
        _sync_directory(path.parent)


def _sync_file(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _sync_directory(directory: Path) -> None:
    """Make the names in `directory` survive a power failure, where the system can (Windows opens no directories)."""
    try:
        handle = os.open(directory, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:  # some network file systems refuse it
        pass
    finally:
        os.close(handle)


def is_leftover(path: Path) -> bool:
    """Whether the name is one that `atomic_directory` and `atomic_file` give to what is not complete."""
    return bool(_LEFTOVER.fullmatch(path.name))


def remove_leftovers(directory: Path) -> None:
    """Remove what killed processes were writing into `directory`; nothing else may be writing there."""
    for path in directory.iterdir() if directory.is_dir() else ():
        if is_leftover(path):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def hidden_sibling(path: Path) -> Path:
    """A new hidden name beside `path`; unlike those of `tempfile`, what is made there follows the umask."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")
