"""Time the kernels on a GPU: achieved bytes per second against a measured copy, and against what torch offers.

    python tools/bench_kernels.py --output benchmarks/kernels/h200.json    # on a GPU
    python tools/bench_kernels.py --check                                  # correctness alone; runs in the interpreter
    python tools/bench_kernels.py --tune tiles.json --budget-seconds 900   # search tile sizes for PHOTON_KERNEL_TILES

Every case is first compared with its definition in float64; only what is right is timed. Times are medians with a cold
cache. On a CPU nothing is timed: the interpreter's times say nothing about a GPU's.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

# The interpreter must be chosen before triton is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from lib.kernel_cases import DTYPE, Case, cases, device  # noqa: E402
from photon_kernels._tiles import candidates, device_name, trial  # noqa: E402
from photon_train.cli import main_wrapper  # noqa: E402
from photon_train.errors import PhotonError  # noqa: E402
from photon_train.evaluation.report import write_rows  # noqa: E402
from photon_train.files import atomic_write_text  # noqa: E402

# Norm of the error, relative to the result's; rounding to bfloat16 alone gives about 2e-3.
TOLERANCE = 1e-2
# Of the plain function's time: what gains less is noise.
WORTH_A_CHANGE = 0.97


def microseconds(function: Callable[[], Any]) -> float:
    """Median time with a cold cache."""
    from triton.testing import do_bench

    return 1e3 * do_bench(function, warmup=10, rep=50, return_mode="median")


def copy_bandwidth() -> float:
    """Bytes per second of a device-to-device copy of 1 GiB, read and written."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / (1e-6 * microseconds(lambda: target.copy_(source)))


def row_of(case: Case, bandwidth: float | None) -> dict[str, Any]:
    """Error of a case and, with a bandwidth, its times.

    Raises:
        PhotonError: if it is wrong.
    """
    error = case.error()
    if not error < TOLERANCE:
        raise PhotonError(f"{case.kernel} ({case.shape}) is off by {error:.1e} of its size, more than {TOLERANCE}")
    row: dict[str, Any] = {
        "kernel": case.kernel,
        "shape": case.shape,
        "dtype": str(DTYPE),
        "error": float(f"{error:.2g}"),
    }
    if bandwidth is None:
        return row
    row["microseconds"] = round(microseconds(case.run), 2)
    if case.nbytes:
        achieved = case.nbytes / (1e-6 * row["microseconds"])
        row |= {"bytes": case.nbytes, "bytes_per_s": round(achieved), "copy_share": round(achieved / bandwidth, 3)}
    if case.flops:
        row["tflop_per_s"] = round(case.flops / row["microseconds"] / 1e6, 1)
    for name, reference in case.references.items():
        took = microseconds(reference)
        row[f"times {name}"] = round(took / row["microseconds"], 2)
    return row


def trials(case: Case) -> Iterator[tuple[str, dict[str, int], float]]:
    """Name of the case in a table of tile sizes, a change, and its time over that of the plain function's choice."""
    from triton.errors import TritonError

    with trial({}) as launched:
        row_of(case, None)
        plain = microseconds(case.run) if launched else 0.0
    for name, default in launched.items():
        for change in candidates(default):
            try:
                with trial({name: change}):
                    row_of(case, None)
                    yield name, change, microseconds(case.run) / plain
            except (TritonError, RuntimeError) as error:  # too much shared memory, mostly
                print(f"{name} {change}: {str(error).splitlines()[0]}")


def tune(builders: Iterator[Callable[[], Case]], path: Path, budget_seconds: float) -> None:
    """Add to the table at `path` what is fastest here, by the mean of the ratios of all cases with one name."""
    began, ratios = time.monotonic(), {}
    for build in builders:
        if time.monotonic() - began > budget_seconds:
            print(f"stopped after {budget_seconds:.0f} seconds: raise --budget-seconds")
            break
        tried = list(trials(build()))
        for name, change, ratio in tried:
            ratios.setdefault(name, {}).setdefault(json.dumps(change), []).append(ratio)
    chosen = {}
    for name, changes in ratios.items():
        most = max(map(len, changes.values()))
        # What did not run in every case is not for all of them.
        means = {text: math.prod(found) ** (1 / most) for text, found in changes.items() if len(found) == most}
        best = min(means, key=means.get)
        print(f"{name}: {means[best]:.2f} of the time with {best}")
        if means[best] < WORTH_A_CHANGE:
            chosen[name] = json.loads(best)
    devices = json.loads(path.read_text(encoding="utf-8"))["devices"] if path.exists() else {}
    devices[device_name(device())] = chosen
    atomic_write_text(path, json.dumps({"devices": devices}, indent=1) + "\n")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare tiny cases with their definitions, time nothing")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/kernels/gpu.json"), help="JSON to write")
    parser.add_argument("--budget-seconds", type=float, default=60.0, help="leave out the cases after so many seconds")
    parser.add_argument("--tune", type=Path, help="time other tile sizes instead; the fastest go to this JSON")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    if not options.check and not torch.cuda.is_available():
        raise PhotonError("there is no GPU, and the interpreter's times mean nothing: give --check to test the kernels")
    torch.manual_seed(0)
    if options.tune:
        tune(cases(small=options.check), options.tune, options.budget_seconds)
        return
    bandwidth = None if options.check else copy_bandwidth()
    rows, began, left_out = [], time.monotonic(), 0
    for build in cases(small=options.check):
        if not options.check and time.monotonic() - began > options.budget_seconds:
            left_out += 1
            continue
        rows.append(row_of(build(), bandwidth))
        print(
            "  ".join(
                f"{name}={value:.3g}" if isinstance(value, float) else str(value) for name, value in rows[-1].items()
            )
        )
        if bandwidth is not None:
            # After every case, so that a run that is stopped has written what it measured.
            write_rows(options.output, rows, copy_bytes_per_s=round(bandwidth))
    if left_out:
        print(f"{left_out} cases left out after {options.budget_seconds:.0f} seconds: raise --budget-seconds")


if __name__ == "__main__":
    main_wrapper(main)
