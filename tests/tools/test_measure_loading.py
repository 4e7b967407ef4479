"""Host memory of loading for ZeRO-3: who does not read the weights holds its share of them alone."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

PATH = Path(__file__).resolve().parents[2] / "tools" / "measure_loading.py"


@pytest.mark.distributed
@pytest.mark.slow
def test_one_process_loads_the_weights_for_all():
    specification = importlib.util.spec_from_file_location("measure_loading", PATH)
    tool = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(tool)
    shape = {**tool.SHAPE, "num_hidden_layers": 1, "memory_cells": {0: [0]}}
    rows = {(row["loads"], row["process"]): row for row in tool.measure(shape)}
    weights = rows["main", 1]["weight_bytes"]
    assert weights > 150e6
    assert rows["every", 1]["peak_bytes"] > weights
    assert rows["main", 1]["peak_bytes"] < 0.9 * weights
