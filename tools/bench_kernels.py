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
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# The interpreter must be chosen before triton is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from photon_kernels import (  # noqa: E402
    Append,
    cache_append,
    gather_chunk_project,
    latent_decode,
    latent_outputs,
    latent_queries,
    paged_decode_attention,
    window_decode_attention,
)
from photon_kernels._tiles import candidates, device_name, trial  # noqa: E402
from photon_train.cli import main_wrapper  # noqa: E402
from photon_train.errors import PhotonError  # noqa: E402
from photon_train.evaluation.report import write_rows  # noqa: E402
from photon_train.files import atomic_write_text  # noqa: E402
from photon_train.models.attention_photon import NewElements  # noqa: E402
from photon_train.models.segments_photon import WindowSegment  # noqa: E402

# Norm of the error, relative to the result's; rounding to bfloat16 alone gives about 2e-3.
TOLERANCE = 1e-2
# Of the plain function's time: what gains less is noise.
WORTH_A_CHANGE = 0.97
DTYPE = torch.bfloat16


@dataclass
class Case:
    """One kernel at one shape.

    Attributes:
        kernel, shape: Names in the result.
        run: Runs it.
        expected: The definition, in float64.
        nbytes: Bytes that must be read and written once; 0 where arithmetic is the limit.
        flops: Operations of its matrix products, where they may be the limit.
        references: What torch offers for the same, by name.
        outcome: What `run` has left to be compared; None: it returns it.
    """

    kernel: str
    shape: str
    run: Callable[[], Any]
    expected: Callable[[], Tensor]
    nbytes: int = 0
    flops: int = 0
    references: dict[str, Callable[[], Any]] = field(default_factory=dict)
    outcome: Callable[[], Tensor] | None = None

    def error(self) -> float:
        """Norm of the error relative to that of the result."""
        with torch.no_grad():
            result = self.run()
            result = self.outcome() if self.outcome else result
            expected = self.expected()
            return float((result.double() - expected).norm() / expected.norm())


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, device=device()).to(DTYPE)


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def nbytes(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def window_case(batch: int, heads: tuple[int, int, int], slots: int, positions: int = 1) -> Case:
    """A full ring, in shuffled order: a window, or an isolated chunk of R + C elements."""
    num_heads, kv_heads, dim = heads
    q = random(batch, num_heads, positions, dim)
    k, v = (random(batch, kv_heads, slots, dim) for _ in range(2))
    index = torch.stack([torch.randperm(slots, device=device()) for _ in range(batch)])
    first = torch.zeros(batch, dtype=torch.long, device=device())
    arguments = index, first, torch.full((batch, positions), slots, device=device()), dim**-0.5
    run = partial(window_decode_attention, q, k, v, *arguments, backend="triton")
    expected = partial(window_decode_attention, q.double(), k.double(), v.double(), *arguments)
    dense = partial(F.scaled_dot_product_attention, q, k, v, enable_gqa=num_heads != kv_heads)
    shape = f"B={batch} heads={num_heads}/{kv_heads} D={dim} N={slots} Q={positions}"
    return Case("window_decode", shape, run, expected, 2 * nbytes(q) + nbytes(k, v), references={"sdpa": dense})


def paged_case(batch: int, heads: tuple[int, int, int], length: int, per_block: int) -> Case:
    """One query per row over the keys of `length` tokens, in shuffled blocks."""
    num_heads, kv_heads, dim = heads
    table = torch.randperm(batch * length // per_block, device=device()).view(batch, -1)
    q = random(batch, num_heads, 1, dim)
    k, v = (random(table.numel(), kv_heads, per_block, dim) for _ in range(2))
    arguments = torch.full((batch, 1), length, device=device()), dim**-0.5, None, table
    run = partial(paged_decode_attention, q, k, v, *arguments, backend="triton")
    expected = partial(paged_decode_attention, q.double(), k.double(), v.double(), *arguments)
    # In one piece: less than the kernel does.
    rows = [states[table].transpose(1, 2).flatten(2, 3) for states in (k, v)]
    dense = partial(F.scaled_dot_product_attention, q, *rows, enable_gqa=num_heads != kv_heads)
    moved = 2 * nbytes(q) + nbytes(k, v, table)
    shape = f"B={batch} heads={num_heads}/{kv_heads} D={dim} N={length} block={per_block}"
    return Case("paged_decode", shape, run, expected, moved, references={"sdpa, contiguous": dense})


def latent_case(
    batch: int, heads: tuple[int, int, int], units: int, per_block: int, chunk: int = 4, bits: int = 16
) -> Case:
    """Folded queries over latents in blocks; in torch these are gathered, and all scores held."""
    num_heads, kv_heads, dim = heads
    width = 2 * kv_heads * dim
    table = torch.randperm(batch * units // per_block, device=device()).view(batch, -1)
    folded = (torch.randn(batch, num_heads, chunk, width, device=device()) * width**-0.5).to(DTYPE)
    bias = torch.randn(batch, num_heads, chunk, device=device())
    visible = torch.full((batch,), units, device=device())
    settings = {"scale": 1.0, "first_token": 4, "block_table": table}
    if bits == 16:
        keys, values = (random(table.numel(), kv_heads, per_block, dim) for _ in range(2))
    else:
        shape = table.numel(), kv_heads, per_block
        codes = torch.randint(0, 256, (2, *shape, dim * bits // 8), dtype=torch.uint8, device=device())
        scales = ((0.5 + torch.rand(2, *shape, 1, device=device())) / 2 ** (bits - 1)).to(torch.bfloat16)
        keys, values = codes
        settings |= {"bits": bits, "scales": tuple(scales)}
    run = partial(latent_decode, folded, bias, keys, values, visible, backend="triton", **settings)
    double = (each.double() if each.is_floating_point() else each for each in (folded, bias, keys, values))
    expected = partial(latent_decode, *double, visible, **settings)
    plain = partial(latent_decode, folded, bias, keys, values, visible, **settings)
    stored = "" if bits == 16 else f" {bits} bits"
    return Case(
        "latent_decode",
        f"B={batch} heads={num_heads}/{kv_heads} D={dim} S={chunk} U={units} block={per_block}{stored}",
        run=lambda: run().mixed,
        expected=lambda: expected().mixed,
        nbytes=nbytes(keys, values, *settings.get("scales", ()), table) + 2 * nbytes(folded),
        flops=4 * batch * num_heads * chunk * units * width,
        references={"gathered, in torch": plain},
    )


def queries_case(batch: int, heads: tuple[int, int, int], cells: int, chunk: int = 2) -> Case:
    """Queries of a layer's memory cells, unrotated and folded."""
    num_heads, kv_heads, dim = heads
    group, width = num_heads // kv_heads, 2 * cells * dim
    query, key_map, key_bias = (
        random(batch, num_heads, dim),
        random(chunk, cells, dim, width),
        random(chunk, cells, dim),
    )
    angles = torch.rand(batch, dim, device=device())
    arguments = query, torch.arange(cells * group, device=device()), key_map, key_bias, angles.cos(), angles.sin()
    double = (each.double() if each.is_floating_point() else each for each in arguments)
    expected = partial(latent_queries, *double)
    return Case(
        "latent_queries",
        f"B={batch} heads={num_heads}/{kv_heads} D={dim} S={chunk} cells={cells}",
        run=lambda: latent_queries(*arguments, backend="triton")[0],
        expected=lambda: expected()[0],
        nbytes=nbytes(query, key_map) + batch * cells * group * chunk * width * query.element_size(),
        references={"in torch": partial(latent_queries, *arguments)},
    )


def outputs_case(batch: int, heads: tuple[int, int, int], cells: int, chunk: int = 2) -> Case:
    """Sums of latents made values, and joined with what near keys gave."""
    num_heads, kv_heads, dim = heads
    group, width = num_heads // kv_heads, 2 * cells * dim
    mixed, value_map = random(batch, cells * group, chunk, width), random(chunk, cells, dim, width) * width**-0.5
    mass = torch.rand(batch, cells * group, chunk, device=device())
    lse, out_lse = torch.randn(batch, cells * group, device=device()), torch.randn(batch, num_heads, device=device())
    given = mixed, mass, lse, torch.arange(cells * group, device=device()), value_map, random(chunk, cells, dim)
    out = random(batch, num_heads, dim)

    def joined(backend: str, dtype: torch.dtype) -> torch.Tensor:
        # In place: every run begins with the same near output (a copy more than the kernel does).
        states = [each.to(dtype) if each.dtype == DTYPE else each for each in given]
        mine = out.to(dtype, copy=True)
        latent_outputs(*states, mine, out_lse.clone(), backend=backend)
        return mine

    return Case(
        "latent_outputs",
        f"B={batch} heads={num_heads}/{kv_heads} D={dim} S={chunk} cells={cells}",
        run=partial(joined, "triton", DTYPE),
        expected=partial(joined, "torch", torch.float64),
        nbytes=nbytes(mixed, value_map) + 4 * nbytes(out),
        references={"in torch": partial(joined, "torch", DTYPE)},
    )


def append_case(batch: int, kv_heads: int, dim: int, slots: int) -> Case:
    """Keys and values of one token per row into a ring."""
    sources = [random(batch, kv_heads, 1, dim) for _ in range(2)]
    targets = [torch.zeros(batch, kv_heads, slots, dim, device=device(), dtype=DTYPE) for _ in range(2)]
    rows, slot = torch.randperm(batch, device=device()), torch.randint(0, slots, (batch, 1), device=device())
    appends = [Append(states, target, rows, slot) for states, target in zip(sources, targets, strict=True)]

    def index_put() -> None:
        for states, target in zip(sources, targets, strict=True):
            target[rows[:, None], :, slot] = states.transpose(1, 2)

    def expected() -> Tensor:
        double = [Append(states.double(), torch.zeros_like(kept).double(), rows, slot) for states, kept, *_ in appends]
        cache_append(double)
        return torch.stack([append.target for append in double])

    return Case(
        "cache_append",
        f"B={batch} heads={kv_heads} D={dim} N={slots}",
        run=partial(cache_append, appends, backend="triton"),
        expected=expected,
        nbytes=2 * nbytes(*sources),
        references={"index_put": index_put},
        outcome=lambda: torch.stack(targets),
    )


def chunker_case(rows: int, width: int, chunk: int) -> Case:
    """The chunker of the rows that close, out of twice as many."""
    states, weight = random(2 * rows, chunk, width), random(width, chunk * width) * (chunk * width) ** -0.5
    picked, scale = torch.randperm(2 * rows, device=device())[:rows], torch.tensor(1.3, device=device())
    run = partial(gather_chunk_project, states, picked, weight, scale, backend="triton")
    expected = partial(gather_chunk_project, states.double(), picked, weight.double(), scale)
    plain = partial(gather_chunk_project, states, picked, weight, scale)
    moved = nbytes(weight) + rows * (chunk + 1) * width * weight.element_size()
    shape = f"rows={rows} C={chunk} d={width}"
    return Case("chunker", shape, run, expected, moved, references={"index, linear": plain})


def band_case(length: int, heads: tuple[int, int, int], window: int, backward: bool) -> Case:
    """A window with sinks over a whole sequence: flex_attention against the same block by block."""
    num_heads, kv_heads, dim = heads
    states = [random(1, count, length, dim).requires_grad_(backward) for count in (num_heads, kv_heads, kv_heads)]
    index, layer = torch.arange(length, device=device())[None], SimpleNamespace(layer_idx=0)
    settings = {"start": index - window + 1, "reach": window - 1, "num_sinks": 4}

    def attend(name: str, states: list[Tensor]) -> Tensor:
        segment = WindowSegment(NewElements(1, index, base=0), **settings, fused=name)
        with torch.set_grad_enabled(backward):
            out = segment.attend(layer, *states, dim**-0.5)
            return torch.autograd.grad(out, states, torch.ones_like(out))[0] if backward else out

    def expected() -> Tensor:
        return attend("no", [each.detach().double().requires_grad_(backward) for each in states])

    name = "band, forward and backward" if backward else "band, forward"
    shape = f"T={length} heads={num_heads}/{kv_heads} D={dim} W={window}"
    return Case(
        name,
        shape,
        partial(attend, "yes", states),
        expected,
        references={"block by block": partial(attend, "no", states)},
    )


def cases(small: bool) -> Iterator[Callable[[], Case]]:
    """Builders of all cases: shapes of 1B and 8B models, or tiny ones."""
    if small:
        heads = (4, 2, 16)
        yield partial(window_case, 2, heads, 8)
        yield partial(window_case, 2, heads, 40, positions=3)
        yield partial(paged_case, 2, heads, 32, per_block=8)
        yield partial(paged_case, 2, heads, 64, per_block=64)
        yield partial(latent_case, 2, heads, 24, per_block=8)
        yield partial(latent_case, 2, (2, 1, 16), 24, per_block=8, chunk=2, bits=4)
        yield partial(queries_case, 3, heads, cells=2)
        yield partial(outputs_case, 3, heads, cells=2)
        yield partial(append_case, 3, 2, 16, 12)
        yield partial(chunker_case, 3, 32, 4)
        yield partial(band_case, 150, heads, 16, backward=False)
        return
    small_heads, large_heads = (32, 8, 64), (32, 8, 128)
    for heads in (small_heads, large_heads):
        # One memory cell of the default: a key-value head's query heads, pairs of tokens in 4 bits.
        cell = heads[0] // heads[1], 1, heads[2]
        yield partial(latent_case, 32, cell, 16_384, per_block=64, chunk=2, bits=4)
        yield partial(queries_case, 32, heads, cells=1)
        yield partial(outputs_case, 32, heads, cells=1)
        yield partial(paged_case, 32, heads, 8192, per_block=256)
        yield partial(paged_case, 256, heads, 256, per_block=16)
        yield partial(latent_case, 8, heads, 8192, per_block=64)
        yield partial(window_case, 4096, heads, 8)
        yield partial(window_case, 1024, heads, 72)
        yield partial(window_case, 256, heads, 84)
        yield partial(window_case, 256, heads, 276)
        yield partial(append_case, 256, 8, heads[2], 84)
    yield partial(paged_case, 1, small_heads, 8192, per_block=256)
    yield partial(paged_case, 8, small_heads, 32768, per_block=256)
    yield partial(latent_case, 64, small_heads, 1024, per_block=64)
    yield partial(latent_case, 2, small_heads, 32768, per_block=64)
    yield partial(window_case, 1024, small_heads, 8, positions=4)
    for rows, width in ((8, 2048), (64, 2048), (8, 4096), (64, 4096)):
        yield partial(chunker_case, rows, width, 4)
    yield partial(band_case, 8192, small_heads, 64, backward=False)
    yield partial(band_case, 8192, small_heads, 64, backward=True)
    yield partial(band_case, 8192, large_heads, 256, backward=True)


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
