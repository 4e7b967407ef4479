"""Make the text of long-context studies from Debian packages: novels, long articles and a manual, as plain text.

python tools/fetch_texts.py --output DIR [--debs DIR]

    DIR/train, DIR/heldout              English, one file per novel, section or chapter: 2k to 200k tokens each
    DIR/code/train, DIR/code/heldout    the Python standard library's sources
    DIR/sources.json                    the packages, with their hashes

Whole documents are held out, of each source. An output that is there already is kept. Every model has read text of this
age and fame: compare models on it, and read no number as one of unseen text.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from lib.long_text import html_to_text, read_r_database, unwrap
from photon_train.cli import main_wrapper
from photon_train.config import DataSettings
from photon_train.data.corpora import read_documents, split_documents
from photon_train.errors import PhotonError
from photon_train.files import atomic_directory
from photon_train.manifest import hash_file

PACKAGES = ("r-cran-janeaustenr", "anarchism", "debian-handbook")
# Of each source about a sixth, whole documents. Section J of the FAQ shares no text with its appendices, as others do.
HELD_OUT = (
    "austen-northangerabbey",
    "austen-persuasion",
    "faq-secJ",
    "handbook-unix-services",
    "handbook-debian-packaging",
)
CODE_HELD_OUT = 0.1
_FAQ_PAGES = re.compile(r"(sec[A-J]\d+|append\d+|biblio)\.html")
_LEAST_CHARACTERS = 8000  # about 2,000 tokens
_NEXT = re.compile(r'<link rel="next" href="([^"#]+)"')
_UP = re.compile(r'<link rel="up" href="([^"#]+)"')


def fetch_texts(output: Path, debs: Path | None = None) -> Path:
    """Write the texts to `output`, unless they are there.

    Args:
        output: New directory; it appears whole or not at all.
        debs: Directory of the packages (``*.deb``), if they lie on the disk already.

    Returns:
        `output`.

    Raises:
        PhotonError: if a package cannot be fetched or has another content, or `output` is something else.
    """
    sources = output / "sources.json"
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        if not sources.is_file():
            raise PhotonError(f"{output} is not empty, and no texts of this tool: give a new directory")
        return output
    with tempfile.TemporaryDirectory() as name, atomic_directory(output) as directory:
        packages = {package: find_package(package, debs or Path(name)) for package in PACKAGES}
        root = Path(name) / "unpacked"
        for path in packages.values():
            _run(["dpkg-deb", "-x", str(path), str(root)])
        for title, text in (*austen(root), *faq(root), *handbook(root)):
            if len(text) >= _LEAST_CHARACTERS:
                side = directory / ("heldout" if title.startswith(HELD_OUT) else "train")
                side.mkdir(exist_ok=True)
                (side / f"{title}.txt").write_text(text, encoding="utf-8")
        write_code(directory / "code")
        content = {package: {"file": path.name, "sha256": hash_file(path)} for package, path in packages.items()}
        (directory / sources.name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return output


def find_package(package: str, directory: Path) -> Path:
    """The package's file in `directory`, downloaded if it is not there.

    Raises:
        PhotonError: if there is no apt, or it cannot.
    """
    found = sorted(directory.glob(f"{package}_*.deb"))
    if not found:
        _run(
            ["apt-get", "download", package],
            directory,
            f"{package} cannot be fetched; run `apt-get update`, or give --debs",
        )
        found = sorted(directory.glob(f"{package}_*.deb"))
    return found[-1]


def _run(command: list[str], directory: Path | None = None, advice: str = "fetch the package again") -> None:
    if shutil.which(command[0]) is None:
        raise PhotonError(f"there is no {command[0]} here: make the texts on Debian or Ubuntu, and copy the directory")
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True)
    if done.returncode:
        raise PhotonError(f"{advice} ({' '.join(command)}: {(done.stderr.strip().splitlines() or ['failed'])[-1]})")


def austen(root: Path) -> Iterator[tuple[str, str]]:
    """Jane Austen's six novels, from the data of the R package."""
    objects = read_r_database(root / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdx")
    for name, lines in objects.items():
        if isinstance(lines, list) and lines and isinstance(lines[0], str):
            yield f"austen-{name}", unwrap(lines)


def faq(root: Path) -> Iterator[tuple[str, str]]:
    """The sections of An Anarchist FAQ, long essays."""
    for path in sorted((root / "usr/share/doc/anarchism/html").glob("*.html")):
        if _FAQ_PAGES.fullmatch(path.name):
            yield f"faq-{path.stem}", html_to_text(path.read_text(encoding="utf-8", errors="replace"))


def handbook(root: Path) -> Iterator[tuple[str, str]]:
    """The chapters of the Debian Administrator's Handbook: pages as their links order them."""
    directory = root / "usr/share/doc/debian-handbook/html/en-US"
    chapters: dict[str, list[str]] = {}
    page, chapter = "index.html", ""
    seen = set()
    while page not in seen and (directory / page).is_file():
        seen.add(page)
        content = (directory / page).read_text(encoding="utf-8")
        up, following = _UP.search(content), _NEXT.search(content)
        if up and up[1] == "index.html":
            chapter = page.removesuffix(".html")
        if chapter:
            chapters.setdefault(chapter, []).append(html_to_text(content))
        if following is None:
            break
        page = following[1]
    for name, pages in chapters.items():
        yield f"handbook-{name}", "\n".join(pages)


def write_code(directory: Path) -> None:
    """The sources of the running Python's standard library, a tenth of the files held out."""
    documents = list(read_documents(None, DataSettings()))
    for side, chosen in zip(("train", "heldout"), split_documents(documents, CODE_HELD_OUT), strict=True):
        for document in chosen:
            path = directory / side / document.name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(document.text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="directory of the texts")
    parser.add_argument("--debs", type=Path, default=None, help=f"where {', '.join(PACKAGES)} lie as .deb files")
    options = parser.parse_args()
    print(fetch_texts(options.output, options.debs))


if __name__ == "__main__":
    main_wrapper(main)
