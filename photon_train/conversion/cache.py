"""Checkpoints made of others once, and kept: what a GGUF file or quantised weights stand for."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from huggingface_hub.utils import WeakFileLock

from photon_train.errors import PhotonError
from photon_train.files import default_cache_dir, make_directory


def cache_path(kind: str, stem: str, key: str) -> Path:
    """The directory for what is made of a source.

    Args:
        kind: Of source; each has a directory of its own.
        stem: What a user recognises it by.
        key: All that the result depends on.
    """
    return default_cache_dir() / kind / f"{stem}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"


def write_once(directory: Path, write: Callable[[Path], None]) -> Path:
    """`directory`, written by `write` where it is missing. Processes that ask at the same time wait for one.

    Raises:
        PhotonError: if the cache cannot be written, and what `write` raises.
    """
    try:
        make_directory(directory.parent)
        with WeakFileLock(directory.parent / f"{directory.name}.lock"):
            if not directory.is_dir():
                write(directory)
    except OSError as error:
        raise PhotonError(
            f"{directory} cannot be written ({error}): set PHOTON_TRAIN_CACHE to another place"
        ) from error
    return directory
