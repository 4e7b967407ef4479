"""Texts and conversations from where users keep them: files, directories, JSONL, Parquet, the hub, Python itself."""

from __future__ import annotations

import codecs
import gzip
import hashlib
import json
import os
import re
import sysconfig
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from photon_train.config import DataSettings
from photon_train.data.directory import COMPRESSED_SUFFIXES, JSONL_SUFFIXES, PARQUET_SUFFIX, is_data_file, survey
from photon_train.data.progress import warn
from photon_train.data.records import Document, document_of, missing_field, wanted_fields, without_nulls
from photon_train.errors import PhotonError, printable

_JSON_SUFFIXES = (*JSONL_SUFFIXES, ".json", ".json.gz")  # many data sets call JSON lines `.json`
_UTF8 = "utf-8-sig"  # Windows begins files with a byte order mark
# Left out of the embedded corpus. Packages of others and byte code are not the standard library; tests, code
# tables (`encodings`, `_sysconfigdata*`) and the manual as one string (`pydoc_data`) are repetitive and would
# dominate; the rest exists on some installations only (Linux distributions ship it apart, Python 3.12 and 3.13
# removed some of it), so leaving it out keeps the corpus nearly the same everywhere.
EXCLUDED_DIRECTORIES = frozenset(
    {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "encodings", "pydoc_data"}
    | {"idlelib", "lib2to3", "distutils", "tkinter", "turtledemo", "ensurepip"}
)
EXCLUDED_FILE_PREFIX = "_sysconfigdata"


def read_documents(source: str | None, settings: DataSettings, max_characters: int | None = None) -> Iterator[Document]:
    """Read the documents of `source` one by one; documents of white space alone are left out.

    JSONL, Parquet and hub rows are read as a stream: one batch of rows is in memory. Plain text files count as one
    document each.

    Args:
        source: None for the embedded corpus (the standard library of the running interpreter); a text file; a
            `.jsonl`, `.jsonl.gz` or `.parquet` file; a `.json` file with an object per line; a directory of text,
            JSONL and Parquet (`directory.survey`; a warning says what is left out); else the id of a hub data set,
            which is streamed.
        settings: Name of the field of text or messages, hub configuration and split, and the most documents to read.
        max_characters: Stop after the document that reaches this many characters. It bounds what is read from a
            hub data set larger than the run needs.

    Raises:
        PhotonError: here when nothing is found at `source`; while iterating when something in it cannot be read
            or when it holds no text.
    """
    return _bounded(_open_source(source, settings), source, settings, max_characters)


def split_documents(documents: Iterable[Document], held_out_fraction: float) -> tuple[list[Document], list[Document]]:
    """Split into training and held-out documents by a hash of each name.

    Where a document goes depends on its name alone, neither on order nor on the other documents, save that no side
    is left empty: if the hash puts all on one side, the one nearest to the threshold changes it. A single
    document is cut at a paragraph (or else a line) break instead, and its tail is held out.

    Returns:
        `(train, held_out)`, each in the order of `documents`.

    Raises:
        PhotonError: if one document without a line break is all there is.
    """
    documents = list(documents)
    if len(documents) == 1:
        if documents[0].messages is not None:
            raise PhotonError(f"{documents[0].name} is the only conversation, so none can be held out: give more")
        return _split_text(documents[0], held_out_fraction)
    points = [hash_point(document.name) for document in documents]
    threshold = split_threshold(min(points), max(points), held_out_fraction) if points else held_out_fraction
    train = [document for document, point in zip(documents, points, strict=True) if point >= threshold]
    held_out = [document for document, point in zip(documents, points, strict=True) if point < threshold]
    if not train or not held_out:
        raise PhotonError(f"{len(documents)} documents cannot be split: give at least two with different names")
    return train, held_out


def split_threshold(least: float, most: float, held_out_fraction: float) -> float:
    """Points below it are held out: the fraction, moved where one side would be empty of points in [least, most]."""
    return min(max(held_out_fraction, least + 2.0**-52), most)


def hash_point(name: str) -> float:
    """A point in [0, 1) drawn by the name."""
    letters = name.encode("utf-8", "surrogateescape")  # names of files need not be UTF-8
    digest = hashlib.blake2b(letters, digest_size=8).digest()
    # 52 bits: each value is exact in a double, and so is the next.
    return (int.from_bytes(digest, "big") >> 12) / 2.0**52


def _split_text(document: Document, held_out_fraction: float) -> tuple[list[Document], list[Document]]:
    text = document.text.strip("\n")
    target = int(len(text) * (1 - held_out_fraction))
    for pattern in (r"\n\s*\n", r"\n"):
        breaks = [match.end() for match in re.finditer(pattern, text)]
        if breaks:
            cut = min(breaks, key=lambda position: abs(position - target))
            head, tail = Document(f"{document.name}#head", text[:cut]), Document(f"{document.name}#tail", text[cut:])
            return [head], [tail]
    raise PhotonError(
        f"{document.name} is a single document without a line break, so no part of it can be held out: "
        "give a second document or break its lines"
    )


def _bounded(
    documents: Iterator[Document], source: str | None, settings: DataSettings, max_characters: int | None
) -> Iterator[Document]:
    read = kept = characters = 0
    for document in documents:
        read += 1
        if document.text.strip():
            kept += 1
            characters += len(document.text)
            yield document
        if kept == settings.max_documents or (max_characters is not None and characters >= max_characters):
            break
    if 0 < kept < read and source is not None:
        warn(f"{source}: {read - kept:,} of {read:,} documents are empty and left out")
    if not kept:
        found = f"all {read} documents are empty" if read else "no documents found"
        raise PhotonError(f"{source or 'the standard library'}: {found}; give a file or directory with text")


def _open_source(source: str | None, settings: DataSettings) -> Iterator[Document]:
    if source is None:
        return _read_standard_library()
    path = Path(source).expanduser()
    if path.is_dir():
        found = survey(path)
        if found.is_notable:
            warn(str(found))
        return _read_directory(path, found.read, settings)
    if path.exists():
        if path.name.lower().endswith(COMPRESSED_SUFFIXES) and not path.name.lower().endswith(_JSON_SUFFIXES):
            raise PhotonError(f"{path}: decompress it (of compressed files, those of JSON lines under gzip are read)")
        return _read_file(path, path.name, settings)
    # A hub id has at most one slash and no path prefix: only then is it worth asking the hub.
    if source.startswith(("/", ".", "~")) or source.count("/") > 1 or is_data_file(path.name):
        raise PhotonError(f"{source}: no such file or directory")
    return _read_hub(source, settings)


def _read_standard_library() -> Iterator[Document]:
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for directory, subdirectories, files in os.walk(root):
        # Pruned here, not filtered after: an installation may hold many gigabytes of other packages.
        subdirectories[:] = set(subdirectories) - EXCLUDED_DIRECTORIES
        names = (name for name in files if name.endswith(".py") and not name.startswith(EXCLUDED_FILE_PREFIX))
        found += [Path(directory, name) for name in names]
    for path in sorted(found):
        try:
            yield Document(path.relative_to(root).as_posix(), path.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, OSError):
            continue  # one odd or unreadable file of an installation must not stop the demo


def data_files(source: Path) -> list[Path]:
    """What is read of a file or directory, in order."""
    return survey(source).read if source.is_dir() else [source]


def _read_directory(root: Path, files: list[Path], settings: DataSettings) -> Iterator[Document]:
    for path in files:
        try:
            yield from _read_file(path, path.relative_to(root).as_posix(), settings)
        except _NotText as error:
            warn(f"left out: {error}")


class _NotText(PhotonError):
    """A text file that is not UTF-8: fatal when asked for by name, left out of a directory with a warning."""


def _read_file(path: Path, name: str, settings: DataSettings) -> Iterator[Document]:
    if path.name.lower().endswith(_JSON_SUFFIXES):
        yield from _read_jsonl(path, name, settings)
    elif path.name.lower().endswith(PARQUET_SUFFIX):
        yield from _read_parquet(path, name, settings)
    else:
        with _readable(path):
            text = path.read_text(encoding=_UTF8)
        yield Document(name, text)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn what goes wrong when reading bytes as text into one message that names the file."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise _NotText(f"{path}: not UTF-8 text (byte {error.start}); convert it to UTF-8") from error
    except (OSError, EOFError, zlib.error) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise PhotonError(f"{path}: cannot be read: {reason}") from error


def _read_jsonl(path: Path, name: str, settings: DataSettings) -> Iterator[Document]:
    with _readable(path), gzip.open(path, "rb") if path.suffix.lower() == ".gz" else open(path, "rb") as file:
        # Old systems end lines with a carriage return alone.
        lines = (line for piece in file for line in piece.splitlines())
        for number, line in enumerate(lines, start=1):
            line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if line.strip():
                record = _record(line, f"{path}:{number}")
                yield document_of(f"{name}:{number}", record, settings, f"{path}:{number}")


def _record(line: bytes, where: str) -> dict[str, Any]:
    """The object that a line holds. A line that holds none is fatal: some of a file would be used, and some not."""
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise PhotonError(f"{where}: not UTF-8 text (byte {error.start} of the line); convert the file") from error
    except json.JSONDecodeError as error:
        raise PhotonError(
            f"{where}: not valid JSON: {error.msg} (column {error.colno}); each line must be an object"
        ) from error
    except (ValueError, RecursionError) as error:
        raise PhotonError(f"{where}: JSON that cannot be read: {_first_line(error)}") from error
    if not isinstance(record, dict):
        raise PhotonError(f"{where}: expected a JSON object per line, got {type(record).__name__}")
    return record


def _read_parquet(path: Path, name: str, settings: DataSettings) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    row = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            present, wanted = file.schema_arrow.names, wanted_fields(settings)
            if wanted[0] not in present:
                raise missing_field(str(path), settings, present)
            for batch in file.iter_batches(batch_size=1024, columns=[field for field in wanted if field in present]):
                for record in batch.to_pylist():
                    yield document_of(f"{name}:{row}", _filled(record), settings, f"{path}: row {row}")
                    row += 1
    except PhotonError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        # Python's values hold less than Arrow's: text must be UTF-8, and years have four digits.
        reason = printable(_first_line(error))
        raise PhotonError(f"{path}: cannot be read as Parquet from row {row:,} on: {reason}") from error


def _read_hub(source: str, settings: DataSettings) -> Iterator[Document]:
    where = f"hub data set {source!r}, split {settings.hub_split!r}"
    try:
        import datasets

        rows = datasets.load_dataset(source, settings.hub_config, split=settings.hub_split, streaming=True)
        for number, record in enumerate(rows):
            name = f"{source}/{settings.hub_split}:{number}"
            yield document_of(name, _filled(record), settings, f"{where}, row {number}")
    except PhotonError:
        raise
    except Exception as error:  # the hub client raises many unrelated types: not found, gated, offline, bad split
        raise PhotonError(
            f"{source}: neither a file or directory here nor readable as {where}: "
            f"{type(error).__name__}: {_first_line(error)}; check the path, dataset.hub_config and dataset.hub_split"
        ) from error


def _filled(record: dict[str, Any]) -> dict[str, Any]:
    """A row of a table, whose fields are all there, without what is empty inside of them."""
    return {field: without_nulls(value) for field, value in record.items()}


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [repr(error)])[0]
