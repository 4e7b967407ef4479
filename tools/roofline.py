"""What decoding can reach at best on a GPU, from bytes and FLOPs alone; needs no GPU, measures nothing.

python tools/roofline.py --output benchmarks/inference/roofline.json

For every shape, context and batch: an upper bound on the tokens per second of the dense model and of PHOTON, and their
ratio. `best` takes each system's own best batch that fits into memory, at most 1024. Written down before anything is
measured on a GPU, so that measurements can be held against it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from lib import roofline
from lib.roofline import DEVICES, Bound
from lib.shapes import SHAPES, SYSTEMS, dense_shape, photon_shape
from photon_train import accounting
from photon_train.cli import main_wrapper
from photon_train.evaluation.report import write_rows


def rows_of(shape: str, device: str, context: int, batch: int | None, window: int, systems: list[str]) -> list[dict]:
    """One row per system; a batch of None is each system's best."""
    dense, on = dense_shape(shape), DEVICES[device]
    bounds: dict[str, Callable[[int], Bound | None]] = {
        "dense": partial(roofline.dense_bound, dense, context, device=on)
    }
    growing = {"dense": float(accounting.dense_cache_bytes(dense, 1))}
    for system in systems:
        photon = photon_shape(dense, system, window)
        bounds[system] = partial(roofline.photon_bound, photon, context, device=on)
        growing[system] = accounting.growing_bytes_per_token(photon)
    found = {
        name: roofline.best(bound(size) for size in ([batch] if batch else roofline.batches()))
        for name, bound in bounds.items()
    }
    return [row for name in bounds if (row := _row(name, found, growing[name], shape, device, context, batch))]


def _row(system: str, found: dict, growing: float, shape: str, device: str, context: int, batch: int | None) -> Any:
    bound, dense = found[system], found["dense"]
    if bound is None:
        return None
    return {
        "device": device,
        "shape": shape,
        "context": context,
        "batches": "best" if batch is None else "equal",
        "batch": bound.batch,
        "system": system,
        "tokens_per_s": round(bound.tokens_per_s, 1),
        "decode_ratio": round(bound.tokens_per_s / dense.tokens_per_s, 3) if dense else None,
        "limit": bound.limit,
        "step_bytes": int(bound.step_bytes),
        "step_flops": int(bound.step_flops),
        "cache_bytes": int(bound.cache_bytes),
        "kv_growing_bytes_per_token": growing,
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=sorted(SHAPES), default=["1b", "8b"])
    parser.add_argument("--devices", nargs="+", choices=sorted(DEVICES), default=["H200", "H100"])
    parser.add_argument("--contexts", nargs="+", type=int, default=[4096, 32_768, 131_072])
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 32, 256], help="equal batches beside the best")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--window", type=int, default=64)
    parser.add_argument("--output", type=Path, default=None, help="JSON to write")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    rows = [
        row
        for device in options.devices
        for shape in options.shapes
        for context in options.contexts
        for batch in [None, *options.batches]
        for row in rows_of(shape, device, context, batch, options.window, options.systems)
    ]
    for row in rows:
        if row["batches"] == "best":
            ratio = f"x{row['decode_ratio']:.1f}" if row["decode_ratio"] else "dense does not fit"
            print(
                f"{row['device']} {row['shape']} {row['context']:7} {row['system']:12} batch {row['batch']:5} "
                f"{row['tokens_per_s']:10.0f} tokens/s {ratio:8} bound by {row['limit']}"
            )
    if options.output:
        devices = {name: vars(DEVICES[name]) for name in options.devices}
        write_rows(
            options.output, rows, claims="upper bounds, nothing measured", window=options.window, devices=devices
        )
        print(options.output)


if __name__ == "__main__":
    main_wrapper(main)
