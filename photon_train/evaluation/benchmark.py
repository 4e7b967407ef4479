"""Benchmark results as JSON: rows, and what they were measured on."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

from photon_train.errors import PhotonError
from photon_train.evaluation.report import machine
from photon_train.files import atomic_write_text
from photon_train.manifest import git_commit, package_versions


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of an earlier `write_rows`; none if there is no file.

    Raises:
        PhotonError: if the file is no benchmark.
    """
    if not path.exists():
        return []
    try:
        return json.loads(path.read_text(encoding="utf-8"))["rows"]
    except (ValueError, KeyError, TypeError) as error:
        raise PhotonError(f"{path} is not a benchmark's result: move it away, or give another --output") from error


def write_rows(path: Path, rows: list[dict[str, Any]], **more: Any) -> None:
    """Write `rows` with machine, versions and commit (and `more`) as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {
        **more,
        "machine": machine(),
        "versions": {"python": platform.python_version(), **package_versions()},
        "commit": git_commit(),
        "rows": rows,
    }
    atomic_write_text(path, json.dumps(record, indent=1, ensure_ascii=False) + "\n")
