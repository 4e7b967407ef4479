"""Benchmark results that are written again, or gone on with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from photon_train.errors import PhotonError


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of an earlier `photon_train.evaluation.report.write_rows`; none if there is no file.

    Raises:
        PhotonError: if the file is no benchmark.
    """
    if not path.exists():
        return []
    try:
        return json.loads(path.read_text(encoding="utf-8"))["rows"]
    except (ValueError, KeyError, TypeError) as error:
        raise PhotonError(f"{path} is not a benchmark's result: move it away, or give another --output") from error
