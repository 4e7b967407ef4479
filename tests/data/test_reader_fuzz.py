"""Whatever bytes a file holds, it is read, or refused or warned about in one line that names it."""

from __future__ import annotations

import gzip
import io
import json
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow
import pyarrow.parquet
from hypothesis import given, settings
from hypothesis import strategies as st

from photon_train.config import DataSettings
from photon_train.data.corpora import read_documents
from photon_train.errors import PhotonError

KINDS = ("txt", "md", "jsonl", "json", "jsonl.gz", "json.gz", "parquet", "none")
TEXTS = st.text(st.characters(), max_size=40)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | TEXTS
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3))
MESSAGES = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant"]) | VALUES, "content": TEXTS | VALUES},
    optional={"tool_calls": st.lists(st.dictionaries(TEXTS, VALUES, max_size=2), max_size=2) | VALUES},
)
SPOKEN = st.lists(st.fixed_dictionaries({"role": TEXTS, "content": TEXTS}), max_size=3)
GOOD_RECORDS = st.fixed_dictionaries({"text": TEXTS, "messages": SPOKEN}, optional={"tools": st.none() | st.just("[]")})
RECORDS = st.fixed_dictionaries(
    {}, optional={"text": TEXTS | VALUES, "messages": st.lists(MESSAGES, max_size=3) | VALUES, "tools": VALUES}
)
CELLS = st.sampled_from([TEXTS, st.binary(max_size=9), st.integers(-9, 9), st.dates(), SPOKEN])


@st.composite
def whole_files(draw: st.DrawFn, kind: str) -> bytes:
    """A file of its kind, whose records are right or nearly so."""
    if kind == "parquet":
        rows, buffer = draw(st.integers(1, 5)), io.BytesIO()
        kinds = {"text": TEXTS, "messages": SPOKEN} if draw(st.booleans()) else {"text": draw(CELLS), "tools": TEXTS}
        columns = {name: draw(st.lists(cells, min_size=rows, max_size=rows)) for name, cells in kinds.items()}
        compression = draw(st.sampled_from(["none", "none", "snappy", "zstd", "gzip"]))
        pyarrow.parquet.write_table(pyarrow.table(_encodable(columns)), buffer, compression=compression)
        return buffer.getvalue()
    if "json" in kind:
        records = draw(st.lists(RECORDS if draw(st.booleans()) else GOOD_RECORDS, min_size=1, max_size=4))
        lines = [json.dumps(record) for record in records]
        raw = draw(st.sampled_from(["\n", "\r\n", "\r", "\n\n"])).join(lines).encode()
        return gzip.compress(raw, mtime=0) if kind.endswith("gz") else raw
    return draw(TEXTS).encode("utf-8", "surrogatepass")


def _encodable(value: object) -> object:
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, list):
        return [_encodable(inner) for inner in value]
    return {key: _encodable(inner) for key, inner in value.items()} if isinstance(value, dict) else value


@st.composite
def damaged_files(draw: st.DrawFn, kind: str) -> bytes:
    """Of a whole file a piece replaced, taken out or doubled; or bytes that have nothing to do with it."""
    sort = draw(st.sampled_from(["whole", "replaced", "replaced", "cut", "cut", "random"]))
    if sort == "random":
        return draw(st.binary(max_size=200))
    content = bytearray(draw(whole_files(kind)))
    for _ in range(draw(st.integers(1, 3)) if sort != "whole" else 0):
        first = draw(st.integers(0, len(content)))
        end = draw(st.integers(first, min(len(content), first + 8)))
        # The end of a Parquet file finds its parts: what is replaced byte by byte leaves it whole.
        size = {"min_size": end - first, "max_size": end - first} if sort == "replaced" else {"max_size": 8}
        content[first:end] = draw(st.binary(**size) | st.just(bytes(content[first:end] * (2 if sort == "cut" else 1))))
    return bytes(content)


@contextmanager
def warnings() -> Iterator[list[str]]:
    """What is logged; `caplog` cannot be used by a test that is run many times."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger("photon_train")
    logger.addHandler(handler)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)


def outcome(source: Path, chat: bool) -> str:
    """`read`, `warned` or `refused`; anything else fails."""
    with warnings() as lines:
        try:
            documents = list(read_documents(str(source), DataSettings(messages_field="messages" if chat else None)))
        except PhotonError as error:
            assert str(source) in str(error) and len(str(error).splitlines()) == 1, repr(str(error))
            assert str(error).encode()
            return "refused"
    assert all(document.text.strip() and document.text.encode() for document in documents)
    assert all(json.dumps(document.messages, ensure_ascii=False).encode() for document in documents)
    assert all(len(line.splitlines()) == 1 and str(source) in line for line in lines), lines
    return "warned" if lines else "read"


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_a_file_is_read_or_refused(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(KINDS))
    content, chat = data.draw(damaged_files(kind)), data.draw(st.booleans())
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "a" if kind == "none" else f"a.{kind}")
        path.write_bytes(content)
        outcome(path, chat)


@given(st.data())
@settings(max_examples=25, deadline=None)
def test_a_directory_is_read_or_refused_or_warned_about(data: st.DataObject) -> None:
    kinds = data.draw(st.lists(st.sampled_from(KINDS), min_size=1, max_size=3))
    with tempfile.TemporaryDirectory() as directory:
        for number, kind in enumerate(kinds):
            Path(directory, f"{number}.{kind}").write_bytes(data.draw(damaged_files(kind)))
        result = outcome(Path(directory), data.draw(st.booleans()))
        assert result != "read" or len(set(kinds)) == 1
