"""Atomic writing: complete or invisible."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from photon_train.errors import PhotonError
from photon_train.files import (
    atomic_directory,
    atomic_write_text,
    check_can_write,
    hidden_sibling,
    parse_size,
    remove_leftovers,
)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_text_is_written_and_replaced(tmp_path: Path) -> None:
    atomic_write_text(tmp_path / "a.txt", "é1")
    atomic_write_text(tmp_path / "a.txt", "é2")
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "é2"
    assert names(tmp_path) == ["a.txt"]


def test_failed_text_leaves_the_old(tmp_path: Path) -> None:
    atomic_write_text(tmp_path / "a.txt", "old")
    with pytest.raises(UnicodeEncodeError):
        atomic_write_text(tmp_path / "a.txt", "new \ud800")
    assert (tmp_path / "a.txt").read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_directory_appears_only_when_complete(tmp_path: Path) -> None:
    with atomic_directory(tmp_path / "deep" / "stage") as temporary:
        (temporary / "file").write_text("1")
        assert not (tmp_path / "deep" / "stage").exists()
        assert temporary.parent == tmp_path / "deep", "a rename needs the same file system"
    assert (tmp_path / "deep" / "stage" / "file").read_text() == "1"
    assert names(tmp_path / "deep") == ["stage"]


def test_directory_is_replaced_whole(tmp_path: Path) -> None:
    for name in ("old", "new"):
        with atomic_directory(tmp_path / "stage") as temporary:
            (temporary / name).write_text(name)
    assert names(tmp_path / "stage") == ["new"]
    assert names(tmp_path) == ["stage"]


def test_failed_directory_leaves_the_old(tmp_path: Path) -> None:
    with atomic_directory(tmp_path / "stage") as temporary:
        (temporary / "file").write_text("old")
    with pytest.raises(KeyboardInterrupt):
        with atomic_directory(tmp_path / "stage") as temporary:
            (temporary / "file").write_text("half")
            raise KeyboardInterrupt
    assert (tmp_path / "stage" / "file").read_text() == "old"
    assert names(tmp_path) == ["stage"]


def test_a_directory_that_cannot_take_its_place_leaves_the_old(tmp_path: Path, monkeypatch) -> None:
    with atomic_directory(tmp_path / "stage") as temporary:
        (temporary / "file").write_text("old")
    replace = os.replace

    def refuse(source, target):
        if Path(target).name == "stage" and (Path(source) / "new").exists():
            raise OSError("refused")
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="refused"):
        with atomic_directory(tmp_path / "stage") as temporary:
            (temporary / "new").write_text("new")
    assert (tmp_path / "stage" / "file").read_text() == "old"
    assert names(tmp_path) == ["stage"]


def test_what_can_be_known_before_writing(tmp_path: Path, monkeypatch) -> None:
    """Room for what is to be written and 64 MiB besides; a directory that is not there or empty."""
    free = shutil.disk_usage(tmp_path)._replace(free=2**30)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    (tmp_path / "empty").mkdir()
    for directory in (tmp_path / "empty", tmp_path / "deep" / "new"):
        check_can_write(directory, 2**30 - 2**26, "the model")
        with pytest.raises(PhotonError, match="1.1 GB free, the model needs 1.1 GB"):
            check_can_write(directory, 2**30 - 2**26 + 1, "the model")
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file"):
        with pytest.raises(PhotonError, match="is not empty"):
            check_can_write(path, 1, "the model")


def test_leftovers_of_killed_processes_and_nothing_else_are_removed(tmp_path: Path) -> None:
    for name in (".hidden", "a.txt", ".config.v2"):
        (tmp_path / name).write_text("kept")
    hidden_sibling(tmp_path / "a.txt").write_text("half")
    (hidden_sibling(tmp_path / "stage") / "inside").mkdir(parents=True)
    remove_leftovers(tmp_path)
    assert names(tmp_path) == [".config.v2", ".hidden", "a.txt"]
    remove_leftovers(tmp_path / "nowhere")


def test_modes_follow_the_umask(tmp_path: Path) -> None:
    """Others who may read a plain file of the user may read what was written atomically."""
    (tmp_path / "plain.txt").write_text("")
    (tmp_path / "plain").mkdir()
    atomic_write_text(tmp_path / "a.txt", "text")
    with atomic_directory(tmp_path / "stage"):
        pass
    assert (tmp_path / "a.txt").stat().st_mode == (tmp_path / "plain.txt").stat().st_mode
    assert (tmp_path / "stage").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("200 MiB", 200 * 2**20), ("1000 B", 1000), ("1.5kb", 1500), (17, 17)]
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["many", "80", "GB", "0MB", "-1GB", "nanGB", "infGB"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(PhotonError, match="memory is .*5GB"):
        parse_size(text, "memory")
