"""The manifest of a stage: what a directory was made of and what must be in it.

A stage writes `manifest.json` last. The next stage verifies it before it reads, so that a truncated or edited file is
found by name, before any work starts.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from photon_train.errors import PhotonError
from photon_train.files import atomic_write_text

FILE_NAME = "manifest.json"
_PACKAGES = ("photon-train", "torch", "transformers", "peft", "accelerate", "deepspeed", "triton", "safetensors")


def write_manifest(directory: Path, stage: str, config: Mapping[str, Any], inputs: Mapping[str, Path]) -> None:
    """Write `manifest.json` into the finished directory of a stage.

    Args:
        directory: Directory of the stage; every file in it, at any depth, is hashed.
        stage: Name of the stage, for example ``converted``.
        config: Resolved configuration (`photon_train.config.to_dict`).
        inputs: What the stage read, by role. A file is hashed; a directory counts by its own manifest if it has one,
            else every file in it is hashed.

    Raises:
        PhotonError: if an input does not exist.
    """
    directory = Path(directory)
    manifest = {
        "stage": stage,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "config": dict(config),
        "inputs": {role: {"path": str(path), "sha256": _hash_input(Path(path))} for role, path in inputs.items()},
        "versions": {"python": platform.python_version(), **package_versions()},
        "git_commit": git_commit(),
        "files": file_entries(directory),
    }
    atomic_write_text(directory / FILE_NAME, json.dumps(manifest, indent=2) + "\n")


def file_entries(directory: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file in `directory` but the manifest, by relative name."""
    return {
        path.relative_to(directory).as_posix(): {"size": path.stat().st_size, "sha256": hash_file(path)}
        for path in _stage_files(directory)
    }


def read_manifest(directory: Path) -> dict[str, Any]:
    """Return the manifest of a stage's directory.

    Raises:
        PhotonError: if it is missing (the stage never finished) or damaged.
    """
    path = Path(directory) / FILE_NAME
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PhotonError(f"{path} is missing: the stage that writes {directory} did not finish; redo it") from None
    except (OSError, ValueError) as error:
        raise PhotonError(f"{path} cannot be read ({error}); redo the stage that writes {directory}") from error
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict) or "stage" not in manifest:
        raise PhotonError(f"{path} is not a stage's manifest; redo the stage that writes {directory}")
    return manifest


def verify_manifest(directory: Path) -> dict[str, Any]:
    """Check that every file of a stage is there, whole and unchanged; return the manifest.

    Files that the manifest does not list are ignored. Sizes are compared first, so that a truncated file is found
    without reading the others.

    Raises:
        PhotonError: naming the first file that is missing or differs, and the stage to redo.
    """
    directory = Path(directory)
    manifest = read_manifest(directory)
    redo = f"redo the stage {manifest['stage']!r}"
    for name, entry in manifest["files"].items():
        path = directory / name
        if not path.is_file():
            raise PhotonError(f"{path} is missing: {redo}")
        if path.stat().st_size != entry["size"]:
            raise PhotonError(f"{path} has {path.stat().st_size} bytes instead of {entry['size']}: {redo}")
    for name, entry in manifest["files"].items():
        if hash_file(directory / name) != entry["sha256"]:
            raise PhotonError(f"{directory / name} was changed (its sha256 is not the recorded one): {redo}")
    return manifest


def hash_file(path: Path) -> str:
    """SHA-256 of a file as hexadecimal text, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def _stage_files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file() and path != directory / FILE_NAME)


def _hash_input(path: Path) -> str:
    if path.is_file():
        return hash_file(path)
    if not path.is_dir():
        raise PhotonError(f"{path} does not exist")
    if (path / FILE_NAME).is_file():
        return hash_file(path / FILE_NAME)
    digest = hashlib.sha256()
    for file in _stage_files(path):
        digest.update(f"{file.relative_to(path).as_posix()} {hash_file(file)}\n".encode())
    return digest.hexdigest()


def package_versions() -> dict[str, str]:
    """Versions of the installed packages that results depend on."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def git_commit() -> str | None:
    """Commit of the checkout that the package runs from, marked when edited; None for an installed package."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    try:
        run = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"],
            cwd=root,
            capture_output=True,
            text=True,
            timeout=30,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return run.stdout.strip() or None
