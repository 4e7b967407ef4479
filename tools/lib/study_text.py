"""The text of quality studies: Python sources that are on every machine that can run one."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from photon_train.config import DataSettings
from photon_train.data.corpora import Document, read_documents

_FILE_BYTES = (2_000, 200_000)  # shorter files hold no long context, longer ones are mostly generated


def study_documents(characters: float) -> list[Document]:
    """Sources of the standard library and then of the installed packages in the order of a hash, without doubles.

    Args:
        characters: Stop after the document that reaches this many.
    """
    found, seen, total = [], set(), 0
    for document in (*read_documents(None, DataSettings()), *_installed_sources()):
        digest = hashlib.sha256(document.text.encode()).digest()
        if digest not in seen:
            seen.add(digest)
            found.append(document)
            total += len(document.text)
        if total >= characters:
            break
    return found


def _installed_sources() -> Iterator[Document]:
    root = Path(sysconfig.get_paths()["purelib"])
    files = [path for path in root.rglob("*.py") if _FILE_BYTES[0] < path.stat().st_size < _FILE_BYTES[1]]
    for path in sorted(files, key=lambda file: hashlib.sha256(str(file.relative_to(root)).encode()).digest()):
        try:
            yield Document(f"site-packages/{path.relative_to(root).as_posix()}", path.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, OSError):
            continue
