"""Novels and articles out of what Debian packages: R's data format, HTML pages, hard-wrapped lines."""

from __future__ import annotations

import gzip
import re
import struct
import zlib
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from photon_train.errors import PhotonError

_BLOCKS = frozenset(
    "address article blockquote br center dd div dl dt hr li ol p pre section table td th tr ul".split()
)
_BLOCKS |= {f"h{level}" for level in range(1, 7)}
_SILENT = frozenset({"head", "script", "style"})
_SILENT_CLASSES = frozenset({"docnav", "banner", "indexterm", "toc"})  # navigation of Publican's pages
_SILENT_IDS = frozenset({"title", "banner"})
_VOID = frozenset({"br", "hr", "img", "link", "meta", "input"})


class _Text(HTMLParser):
    """Collects the text of a page: one line per block, an empty line between blocks."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.blocks: list[str] = []
        self.parts: list[str] = []
        self.open: list[tuple[str, bool]] = []  # tag, whether it hides what it holds
        self.preformatted = 0

    def end_block(self) -> None:
        text = "".join(self.parts)
        text = text.strip("\n") if self.preformatted else " ".join(text.split())
        if text.strip():
            self.blocks.append(text)
        self.parts = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in _BLOCKS:
            self.end_block()
        if tag in _VOID:
            return
        found = {name: value or "" for name, value in attrs}
        silent = tag in _SILENT or found.get("id") in _SILENT_IDS
        silent = silent or not _SILENT_CLASSES.isdisjoint(found.get("class", "").split())
        self.open.append((tag, silent))
        self.preformatted += tag == "pre"

    def handle_endtag(self, tag: str) -> None:
        if tag in _BLOCKS:
            self.end_block()
        if any(name == tag for name, _ in self.open):  # pages in the wild leave tags open, and close what is not
            while True:
                name, _ = self.open.pop()
                self.preformatted -= name == "pre"
                if name == tag:
                    return

    def handle_data(self, data: str) -> None:
        if not any(silent for _, silent in self.open):
            self.parts.append(data)


def html_to_text(page: str) -> str:
    """The text of a page, one paragraph per line, an empty line between paragraphs."""
    parser = _Text()
    parser.feed(page)
    parser.close()
    parser.end_block()
    return "\n\n".join(parser.blocks) + "\n"


def unwrap(lines: list[str]) -> str:
    """Hard-wrapped lines as paragraphs of one line each; empty lines separate them."""
    paragraphs = re.split(r"\n\s*\n", "\n".join(lines))
    return "\n\n".join(" ".join(part.split()) for part in paragraphs if part.strip()) + "\n"


def read_r_database(path: Path) -> dict[str, Any]:
    """The objects of an R package's data: vectors of text or numbers, and lists of them.

    R stores values, not programs, and only plain ones are decoded here: nothing in the file is executed.

    Args:
        path: ``Rdata.rdx``, the index; ``Rdata.rdb`` lies beside it.

    Raises:
        PhotonError: if it is not such a database, or holds other kinds of objects.
    """
    try:
        index = _RReader(gzip.decompress(path.read_bytes())).read()
        blob = path.with_suffix(".rdb").read_bytes()
        found = {}
        for name, (start, length) in index["variables"].items():
            # Four bytes say how long the content is when decompressed.
            found[name] = _RReader(zlib.decompress(blob[start + 4 : start + length])).read()
        return found
    except (OSError, ValueError, KeyError, TypeError, EOFError, struct.error, zlib.error) as error:
        raise PhotonError(
            f"{path} is not a database of R that can be read ({error}): fetch the package again"
        ) from error


class _RReader:
    """Decodes R's serialisation (binary, big-endian, versions 2 and 3; "R Internals", section 1.8)."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 2
        if data[:2] != b"X\n":
            raise ValueError("not in R's XDR format")
        version, _, _ = (self.integer() for _ in range(3))
        if version == 3:
            self.take(self.integer())  # the encoding of the writer's system; strings carry their own
        self.symbols: list[str] = []

    def take(self, count: int) -> bytes:
        if self.at + count > len(self.data):
            raise EOFError("it ends too early")
        self.at += count
        return self.data[self.at - count : self.at]

    def integer(self) -> int:
        return struct.unpack(">i", self.take(4))[0]

    def read(self) -> Any:
        """The next item: a list with names becomes a dict."""
        flags = self.integer()
        kind, has_attributes = flags & 0xFF, bool(flags & 0x200)
        if kind in (254, 242):  # NULL, the empty environment
            return None
        if kind == 255:
            return self.symbols[(flags >> 8 or self.integer()) - 1]
        if kind == 1:
            self.symbols.append(self.read())
            return self.symbols[-1]
        if kind == 9:
            length = self.integer()
            return None if length < 0 else self.take(length).decode("latin-1" if flags >> 12 & 0x4 else "utf-8")
        if kind == 2:
            return dict(self._pairs(flags))
        count = self.integer()
        if kind in (10, 13):
            value: Any = list(struct.unpack(f">{count}i", self.take(4 * count)))
        elif kind == 14:
            value = list(struct.unpack(f">{count}d", self.take(8 * count)))
        elif kind in (16, 19):
            value = [self.read() for _ in range(count)]
        else:
            raise ValueError(f"an object of kind {kind}")
        attributes = self.read() if has_attributes else {}
        return dict(zip(attributes["names"], value, strict=True)) if "names" in attributes else value

    def _pairs(self, flags: int) -> Iterator[tuple[str, Any]]:
        """Tag and value of the cells of a pairlist, whose first cell's flags are read already."""
        while flags & 0xFF == 2:
            if flags & 0x200:
                self.read()
            tag = self.read() if flags & 0x400 else ""
            yield tag, self.read()
            flags = self.integer()
        if flags & 0xFF != 254:
            raise ValueError(f"a pairlist that ends in kind {flags & 0xFF}")
