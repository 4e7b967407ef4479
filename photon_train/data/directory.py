"""What of a directory is read as text, and what is not and why."""

from __future__ import annotations

import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from photon_train.errors import printable

JSONL_SUFFIXES = (".jsonl", ".jsonl.gz")
PARQUET_SUFFIX = ".parquet"
TEXT_SUFFIXES = (
    *(".txt", ".text", ".md", ".rst", ".tex", ".html", ".xml", ".csv", ".org"),
    *(".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".rs", ".go", ".java", ".kt", ".js", ".ts", ".rb"),
    *(".sh", ".sql", ".toml", ".yaml", ".yml"),
)
COMPRESSED_SUFFIXES = (".gz", ".zst", ".bz2", ".xz", ".lz4", ".zip", ".tar", ".tgz", ".7z")

_ROW_SUFFIXES = (*JSONL_SUFFIXES, PARQUET_SUFFIX)
_TRAIN = re.compile(r"train(ing)?([-_.]?\d[-\w]*)?", re.IGNORECASE)
_OTHER_SPLIT = re.compile(r"(test|testing|valid|validation|val|dev|eval)([-_.]?\d[-\w]*)?", re.IGNORECASE)
_EXAMPLES = 5  # names that are given of each sort of what is left out
_HIDDEN = "hidden"
_LINKS = "links to directories (give what they point to as sources)"
_UNREADABLE = "directories that cannot be opened"
_NO_FILES = "links to nothing, pipes and the like"
_SPLITS = "beside training data under the name of another split (to train on them too, give them as sources)"
_READMES = "that tell about the rows beside them"
_JSON = ".json, which may hold anything (rename to .jsonl where each line is an object)"
_OTHER = "of other kinds"
_COMPRESSED = "compressed in a way that is not read (decompress them)"


@dataclass(frozen=True)
class Survey:
    """The files of a directory.

    Attributes:
        root: The directory.
        read: What is read, in order.
        left_out: What is not, by the reason, which goes on after a count.
    """

    root: Path
    read: list[Path]
    left_out: dict[str, list[Path]]

    @property
    def is_notable(self) -> bool:
        """Whether more can be said than that all files, of one kind, are read."""
        return bool(self.left_out) or len({_kind(path.name) for path in self.read}) > 1

    def __str__(self) -> str:
        kinds = Counter(_kind(path.name) for path in self.read).most_common()
        read = f"{len(self.read):,} files are read" + (
            f" ({', '.join(f'{count:,} {kind}' for kind, count in kinds)})" if kinds else ""
        )
        left_out = [self._left(reason, paths) for reason, paths in self.left_out.items()]
        return f"{printable(self.root)}: {read}" + (f"; left out: {'; '.join(left_out)}" if left_out else "")

    def _left(self, reason: str, paths: list[Path]) -> str:
        if reason == _OTHER:
            kinds = Counter(_kind(path.name) for path in paths).most_common()
            names = [f"{count:,} {kind}" for kind, count in kinds]
        else:
            names = [printable(path.relative_to(self.root).as_posix()) for path in paths]
        examples = ", ".join(names[:_EXAMPLES]) + (", ..." if len(names) > _EXAMPLES else "")
        return f"{len(paths):,} {reason}: {examples}"


def is_data_file(name: str) -> bool:
    """Whether the name of a file tells that it holds text or rows."""
    return name.lower().endswith((*_ROW_SUFFIXES, *TEXT_SUFFIXES))


def survey(root: Path) -> Survey:
    """Sort the files under `root` into what is read and what is not.

    Read are text, JSONL and Parquet. Hidden names and links to directories are not followed. Where a directory holds
    a split named `train`, its other splits are not read, and no README where there are rows.
    """
    read: list[Path] = []
    left_out: dict[str, list[Path]] = {}

    def leave(reason: str, path: Path) -> None:
        left_out.setdefault(reason, []).append(path)

    walk = os.walk(root, onerror=lambda error: leave(_UNREADABLE, Path(error.filename)))
    for directory, directories, files in walk:
        place, splits = Path(directory), _other_splits(directories, files)
        for name in sorted(directories):
            path = place / name
            linked = _LINKS if path.is_symlink() else None
            if reason := _HIDDEN if name.startswith(".") else linked or (_SPLITS if name in splits else None):
                leave(reason, path)
                directories.remove(name)
        for name in sorted(files):
            path = place / name
            if reason := _SPLITS if name in splits else _reason(path):
                leave(reason, path)
            else:
                read.append(path)
    if any(path.name.lower().endswith(_ROW_SUFFIXES) for path in read):
        for path in [path for path in read if path.stem.lower() == "readme"]:
            leave(_READMES, path)
            read.remove(path)
    return Survey(root, sorted(read), {reason: sorted(paths) for reason, paths in left_out.items()})


def _reason(path: Path) -> str | None:
    """Why a file is not read; None if it is."""
    name = path.name.lower()
    if name.startswith("."):
        return _HIDDEN
    if not path.is_file():
        return _NO_FILES
    if is_data_file(name):
        return None
    if name.endswith(".json"):
        return _JSON
    return _COMPRESSED if name.endswith(COMPRESSED_SUFFIXES) else _OTHER


def _other_splits(directories: list[str], files: list[str]) -> set[str]:
    """Those of the entries of a directory that are splits beside one to train on."""
    suffixes = (*_ROW_SUFFIXES, ".txt", ".text")
    stems = {name: name for name in directories}
    for name in files:
        suffix = next((suffix for suffix in suffixes if name.lower().endswith(suffix)), None)
        if suffix:
            stems[name] = name[: -len(suffix)]
    if not any(_TRAIN.fullmatch(stem) for stem in stems.values()):
        return set()
    return {name for name, stem in stems.items() if _OTHER_SPLIT.fullmatch(stem)}


def _kind(name: str) -> str:
    """The suffix of a file, with the one before it where it is compressed."""
    suffixes = Path(name.lower()).suffixes
    count = 2 if suffixes[-1:] and suffixes[-1] in COMPRESSED_SUFFIXES else 1
    return printable("".join(suffixes[-count:])) or "without a suffix"
