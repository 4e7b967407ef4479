"""Measured tile sizes: a table by device and case that takes precedence over the plain functions' choices.

``tools/bench_kernels.py --tune FILE`` writes a table; ``PHOTON_KERNEL_TILES=FILE`` makes the launchers use it. The file
is read once, at the first launch: nothing is searched while a model runs, and without it none is looked up.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

VARIABLE = "PHOTON_KERNEL_TILES"
Config = TypeVar("Config", bound=NamedTuple)
# Case -> what differs from the plain function's choice.
Table = Mapping[str, Mapping[str, int]]

_trials: list[tuple[Table, dict[str, Any]]] = []


def tuned(kernel: str, default: Config, device: torch.device, **shape: int) -> Config:
    """The configuration of a launch: the table's for this device, kernel and shape, otherwise ``default``.

    Raises:
        ValueError: The table cannot be read, or holds what no kernel can run with.
    """
    table = _trials[-1][0] if _trials else _read().get(device_name(device))
    if table is None:
        return default
    case = " ".join([kernel, *(f"{name}={value}" for name, value in shape.items())])
    if _trials:
        _trials[-1][1][case] = default
    return _changed(default, case, table[case]) if case in table else default


@contextlib.contextmanager
def trial(table: Table) -> Iterator[dict[str, Any]]:
    """Use ``table`` alone; gives the cases that were launched meanwhile, with the plain functions' choices."""
    _trials.append((table, {}))
    try:
        yield _trials[-1][1]
    finally:
        _trials.pop()


def candidates(default: Config) -> Iterator[dict[str, int]]:
    """What is worth a trial: half and twice the keys per tile, other numbers of warps and pipeline stages."""
    for block_n, num_warps, num_stages in itertools.product(
        (default.block_n // 2, default.block_n, 2 * default.block_n), (4, 8), (2, 3, 4)
    ):
        change = {"block_n": block_n, "num_warps": num_warps, "num_stages": num_stages}
        if block_n >= 16 and default._replace(**change) != default:
            yield change


@functools.cache
def device_name(device: torch.device) -> str:
    """Its name in a table."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@functools.cache
def _read() -> dict[str, Table]:
    path = os.environ.get(VARIABLE)
    if not path:
        return {}
    try:
        devices = json.loads(Path(path).read_text(encoding="utf-8"))["devices"]
        if all(isinstance(entry, dict) for table in devices.values() for entry in table.values()):
            return devices
        reason: Any = "an entry is not an object"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = repr(error)
    raise ValueError(
        f"{VARIABLE}={path} is no table of tile sizes ({reason}): write it anew with tools/bench_kernels.py --tune, or "
        "unset the variable"
    )


def _changed(default: Config, case: str, change: Mapping[str, int]) -> Config:
    for name, value in change.items():
        least = 16 if name.startswith("block_") else 1
        # The head dimension's tile follows from the shape.
        fits = name in default._fields and name != "block_d" and isinstance(value, int) and value >= least
        if not fits or (name != "num_stages" and value & (value - 1)):
            raise ValueError(f"tile table, {case!r}: {name}={value!r} is not possible for this kernel")
    return default._replace(**change)
