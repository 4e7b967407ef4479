"""A stage's manifest: what is recorded, and that any damage is found by name."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable
from pathlib import Path

import pytest

from photon_train.errors import PhotonError
from photon_train.manifest import read_manifest, verify_manifest, write_manifest


@pytest.fixture
def stage(tmp_path: Path) -> Path:
    directory = tmp_path / "converted"
    (directory / "sub").mkdir(parents=True)
    (directory / "weights.safetensors").write_bytes(b"w" * 3_000_000)
    (directory / "sub" / "config.json").write_text("{}")
    source = tmp_path / "source.txt"
    source.write_text("source")
    write_manifest(directory, "converted", {"seed": 3}, {"model": source, "folder": directory / "sub"})
    return directory


def test_content(stage: Path) -> None:
    manifest = read_manifest(stage)
    assert manifest["stage"] == "converted"
    assert manifest["config"] == {"seed": 3}
    assert manifest["inputs"]["model"]["sha256"] == hashlib.sha256(b"source").hexdigest()
    assert set(manifest["files"]) == {"weights.safetensors", "sub/config.json"}
    entry = manifest["files"]["weights.safetensors"]
    assert entry == {"size": 3_000_000, "sha256": hashlib.sha256(b"w" * 3_000_000).hexdigest()}
    assert manifest["versions"]["python"] == platform.python_version()
    assert {"torch", "transformers", "peft", "accelerate"} <= set(manifest["versions"])
    assert manifest["created"].endswith("+00:00")


def test_whole_stage_passes_and_extra_files_do_not_matter(stage: Path) -> None:
    (stage / "notes.txt").write_text("mine")
    assert verify_manifest(stage)["stage"] == "converted"


def _truncate(stage: Path) -> None:
    (stage / "weights.safetensors").write_bytes(b"w" * 2_999_999)


def _alter(stage: Path) -> None:
    (stage / "weights.safetensors").write_bytes(b"w" * 2_999_999 + b"x")


def _remove(stage: Path) -> None:
    (stage / "sub" / "config.json").unlink()


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        (_truncate, ["weights.safetensors", "2999999 bytes instead of 3000000"]),
        (_alter, ["weights.safetensors", "changed"]),
        (_remove, ["sub/config.json", "missing"]),
    ],
)
def test_damage_is_named(stage: Path, damage: Callable[[Path], None], parts: list[str]) -> None:
    damage(stage)
    with pytest.raises(PhotonError) as error:
        verify_manifest(stage)
    for part in [*parts, "redo the stage 'converted'"]:
        assert part in str(error.value)


def test_unfinished_stage(tmp_path: Path) -> None:
    with pytest.raises(PhotonError, match="did not finish; redo it"):
        verify_manifest(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "{}", json.dumps({"stage": "converted"})])
def test_damaged_manifest(stage: Path, text: str) -> None:
    (stage / "manifest.json").write_text(text)
    with pytest.raises(PhotonError, match="manifest.json.*redo the stage"):
        verify_manifest(stage)


def test_missing_input(tmp_path: Path) -> None:
    with pytest.raises(PhotonError, match="absent.txt does not exist"):
        write_manifest(tmp_path, "converted", {}, {"model": tmp_path / "absent.txt"})
    assert not (tmp_path / "manifest.json").exists()


def test_a_stage_as_input_counts_by_its_manifest(stage: Path, tmp_path: Path) -> None:
    following = tmp_path / "export"
    following.mkdir()
    write_manifest(following, "export", {}, {"converted": stage})
    expected = hashlib.sha256((stage / "manifest.json").read_bytes()).hexdigest()
    assert read_manifest(following)["inputs"]["converted"]["sha256"] == expected


def test_a_folder_as_input_counts_by_names_and_contents(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    hashes = set()
    for name, text in (("a.txt", "1"), ("a.txt", "2"), ("b.txt", "2")):
        for file in folder.iterdir():
            file.unlink()
        (folder / name).write_text(text)
        write_manifest(tmp_path, "stage", {}, {"data": folder})
        hashes.add(read_manifest(tmp_path)["inputs"]["data"]["sha256"])
    assert len(hashes) == 3


def test_a_file_that_has_grown_is_told_by_its_size(stage: Path) -> None:
    name, entry = next(iter(read_manifest(stage)["files"].items()))
    with open(stage / name, "ab") as file:
        file.write(b"more")
    with pytest.raises(PhotonError, match=f"has {entry['size'] + 4} bytes instead of {entry['size']}"):
        verify_manifest(stage)
