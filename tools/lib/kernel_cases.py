"""The kernels at the shapes that `tools/bench_kernels.py` times, each with its definition in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from photon_kernels import (
    Append,
    cache_append,
    gather_chunk_project,
    latent_decode,
    latent_outputs,
    latent_queries,
    paged_decode_attention,
    unit_pack,
    window_decode_attention,
)
from photon_train.models.attention_photon import NewElements
from photon_train.models.segments_photon import WindowSegment

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


def pack_case(batch: int, heads: tuple[int, int, int], cells: int, chunk: int = 2) -> Case:
    """The unit that leaves the window, from a ring to blocks in 4 bits; what is compared is stored in 16.

    A number between two levels of 4 bits may fall to either after a rounding.
    """
    _, kv_heads, dim = heads
    slots, per_block = 4 + 512 + chunk, 64
    keys, values = (random(batch, kv_heads, slots, dim) for _ in range(2))
    chunker = random(2 * cells * dim, chunk * 2 * cells * dim) * (2 * chunk * cells * dim) ** -0.5
    angles = torch.rand(batch, chunk, dim, device=device())
    units = torch.randint(0, per_block, (batch,), device=device())
    where = {
        "rows": torch.randperm(batch, device=device()),
        "slots": torch.randint(0, slots, (batch, chunk), device=device()),
        "heads": torch.arange(cells, device=device()),
        "units": units,
        "block_table": torch.randperm(batch, device=device())[:, None],
    }
    shape = batch, cells, per_block
    codes = [torch.zeros(*shape, dim // 2, dtype=torch.uint8, device=device()) for _ in range(2)]
    codes += [torch.zeros(*shape, 1, dtype=torch.bfloat16, device=device()) for _ in range(2)]

    def packed(backend: str, dtype: torch.dtype, bits: int) -> Tensor:
        states = {"keys": keys, "values": values, "cosine": angles.cos(), "sine": angles.sin()}
        states = {name: each.to(dtype) for name, each in states.items()}
        weights, biases = chunker.to(dtype).chunk(2), torch.zeros(2, cells * dim, dtype=dtype, device=device()).unbind()
        targets = codes if bits == 4 else [torch.zeros(*shape, dim, dtype=dtype, device=device()) for _ in range(2)]
        unit_pack(**states, **where, weights=weights, biases=biases, targets=targets, bits=bits, backend=backend)
        return torch.stack(targets[:2])

    return Case(
        "unit_pack",
        f"B={batch} heads={kv_heads} D={dim} S={chunk} cells={cells}",
        run=partial(packed, "triton", DTYPE, 4),
        expected=partial(packed, "torch", torch.float64, 16),
        nbytes=nbytes(chunker) + batch * cells * dim * (2 * chunk * DTYPE.itemsize + 1),
        references={"in torch": partial(packed, "torch", DTYPE, 4)},
        outcome=partial(packed, "triton", DTYPE, 16),
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
        yield partial(pack_case, 3, heads, cells=2)
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
        yield partial(pack_case, 32, heads, cells=1)
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
