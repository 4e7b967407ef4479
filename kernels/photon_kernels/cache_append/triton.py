"""Triton kernel of the cache append: one launch for several sources and targets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import triton
import triton.language as tl

from photon_kernels._backend import current_device_of, next_power_of_2, with_dense_rows
from photon_kernels._compile_case import CompileCase
from photon_kernels.cache_append.naive import Append

# The kernel is unrolled over what it appends: more of them are several launches.
MAX_APPENDS = 8
MAX_BLOCK = 1024


class Geometry(NamedTuple):
    """What the kernel is compiled for, per append."""

    heads: int
    head_dim: int
    positions: int
    per_block: int  # 0: in one piece


@triton.jit
def cache_append_kernel(
    sources,
    targets,
    rows,
    slots,
    block_tables,
    source_strides,
    target_strides,
    pitches,
    HEADS: tl.constexpr,
    HEAD_DIMS: tl.constexpr,
    POSITIONS: tl.constexpr,
    PER_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program ``(i, w, t)`` stores the t-th block of elements of row i of the w-th source, at each of its positions."""
    row = tl.program_id(0)
    which = tl.program_id(1)
    element = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    # Unrolled: each append has pointers and a layout of its own.
    for w in tl.static_range(len(sources)):
        if which == w:
            head_dim: tl.constexpr = HEAD_DIMS[w]
            num_positions: tl.constexpr = POSITIONS[w]
            per_block: tl.constexpr = PER_BLOCK[w]
            # 64 bits from here on: a cache, or one row of it, may have more than 2^31 elements.
            head = (element // head_dim).to(tl.int64)
            dim = element % head_dim
            inside = element < HEADS[w] * head_dim
            cache_row = tl.load(rows[w] + row).to(tl.int64)
            source = sources[w] + row.to(tl.int64) * source_strides[w][0] + head * source_strides[w][1] + dim
            for position in tl.static_range(num_positions):
                slot = tl.load(slots[w] + row * num_positions + position).to(tl.int64)
                if slot >= 0:
                    block = cache_row
                    inside_block = slot
                    if per_block > 0:
                        entry = block_tables[w] + cache_row * pitches[w] + slot // per_block
                        block = tl.load(entry).to(tl.int64)
                        inside_block = slot % per_block
                    state = tl.load(source + position * source_strides[w][2], mask=inside, other=0.0)
                    target = targets[w] + block * target_strides[w][0] + inside_block * target_strides[w][2]
                    tl.store(
                        target + head * target_strides[w][1] + dim,
                        state.to(targets[w].dtype.element_ty),
                        mask=inside,
                    )


def _geometry(append: Append) -> Geometry:
    _, heads, positions, head_dim = append.source.shape
    return Geometry(heads, head_dim, positions, 0 if append.block_table is None else append.target.shape[2])


def cache_append_triton(appends: Sequence[Append]) -> None:
    """Arguments as in ``cache_append``."""
    appends = [append for append in appends if append.source.numel()]
    for start in range(0, len(appends), MAX_APPENDS):
        _launch(appends[start : start + MAX_APPENDS])


def _launch(appends: Sequence[Append]) -> None:
    sources = tuple(with_dense_rows(append.source) for append in appends)
    targets = tuple(append.target for append in appends)
    if any(target.stride(-1) != 1 for target in targets):
        raise ValueError("the last dimension of every target must be contiguous: it is written in place")
    tables = [None if append.block_table is None else with_dense_rows(append.block_table) for append in appends]
    geometries = [_geometry(append) for append in appends]
    widest = max(one.heads * one.head_dim for one in geometries)
    block = min(MAX_BLOCK, next_power_of_2(widest))
    grid = (sources[0].shape[0], len(appends), triton.cdiv(widest, block))
    heads, head_dims, positions, per_block = zip(*geometries, strict=True)
    with current_device_of(targets[0]):
        cache_append_kernel[grid](
            sources,
            targets,
            tuple(append.rows.contiguous() for append in appends),
            tuple(append.slots.contiguous() for append in appends),
            # A kernel wants a pointer even where it reads none.
            tuple(append.rows if table is None else table for append, table in zip(appends, tables, strict=True)),
            tuple(source.stride()[:3] for source in sources),
            tuple(target.stride()[:3] for target in targets),
            tuple(0 if table is None else table.stride(0) for table in tables),
            HEADS=heads,
            HEAD_DIMS=head_dims,
            POSITIONS=positions,
            PER_BLOCK=per_block,
            BLOCK=block,
            num_warps=4,
        )


def compile_cases() -> Iterator[CompileCase]:
    """What ``photon_kernels.aot`` compiles: one layer's keys and values; and what a step appends when levels close."""
    token = Geometry(heads=8, head_dim=128, positions=1, per_block=0)
    slots = token._replace(positions=4)
    open_chunk = Geometry(heads=1, head_dim=4096, positions=1, per_block=0)
    unit = token._replace(per_block=16)
    level_1 = token._replace(per_block=64)
    for name, dtype, geometries in [
        ("keys and values", "bf16", [token] * 2),
        ("keys and values of 4 slots", "bf16", [slots] * 2),
        ("open chunks, units of two levels", "bf16", [open_chunk] * 2 + [level_1] * 2 + [unit] * 4),
    ]:
        count = len(geometries)
        heads, head_dims, positions, per_block = zip(*geometries, strict=True)
        yield CompileCase(
            name=f"cache_append {dtype} {name}",
            kernel=cache_append_kernel,
            types={
                **dict.fromkeys(("sources", "targets"), (f"*{dtype}",) * count),
                **dict.fromkeys(("rows", "slots", "block_tables"), ("*i64",) * count),
                "pitches": ("i32",) * count,
                **dict.fromkeys(("source_strides", "target_strides"), (("i32",) * 3,) * count),
            },
            constants={
                "HEADS": heads,
                "HEAD_DIMS": head_dims,
                "POSITIONS": positions,
                "PER_BLOCK": per_block,
                "BLOCK": min(MAX_BLOCK, next_power_of_2(max(one.heads * one.head_dim for one in geometries))),
            },
            num_warps=4,
            num_stages=1,
        )
