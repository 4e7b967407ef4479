"""What tells one text from another: hashes of sources, of documents and of arrays, each as hexadecimal digits."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from photon_train.data.corpora import data_files
from photon_train.data.records import Document
from photon_train.errors import PhotonError
from photon_train.manifest import hash_file


def local_source(source: str | None) -> Path | None:
    """The file or directory that `source` names; None for what is not on this machine's disks."""
    path = None if source is None else Path(source).expanduser()
    return path if path is not None and path.exists() else None


def source_stamps(source: str | None) -> list[list[str | int]] | None:
    """Name, bytes and time of the last change of every file that is read: equal ones need not be hashed again."""
    path = local_source(source)
    if path is None:
        return None
    with_times = ((_name(file, path), file.stat()) for file in data_files(path))
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in with_times]


def source_hash(source: str | None) -> str | None:
    """Of the names and bytes of the files that are read; None for what is not on this machine's disks.

    Raises:
        PhotonError: if a file cannot be read.
    """
    path = local_source(source)
    if path is None:
        return None
    digest = hashlib.sha256()
    for file in data_files(path):
        try:
            digest.update(f"{_name(file, path)}\0{hash_file(file)}\n".encode())
        except OSError as error:
            raise PhotonError(f"{file}: cannot be read: {error.strerror or error}") from error
    return digest.hexdigest()


def documents_hash(documents: Iterable[Document]) -> str:
    """Of the names and all that is said."""
    digest = hashlib.sha256()
    for document in documents:
        said = document.text if document.messages is None else [document.messages, document.tools]
        digest.update(json.dumps([document.name, said], default=str).encode() + b"\n")
    return digest.hexdigest()


def arrays_hash(*arrays: np.ndarray | None) -> str:
    """Of the types, the shapes and what the arrays hold; an array that is missing counts as one."""
    digest = hashlib.sha256()
    for array in arrays:
        if array is None:
            digest.update(b"none\n")
            continue
        digest.update(f"{array.dtype} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _name(file: Path, source: Path) -> str:
    """Relative to a directory, in letters that every encoding has."""
    return ascii(file.relative_to(source).as_posix() if file != source else file.name)
