"""Triton kernels of the decode attention over summaries: split over the sequence, then combined.

A decode step offers B * Hkv independent rows, too few for a GPU at small batches, while the stream is long. So each row
is cut into parts that are attended to independently ("flash-decoding"); their outputs are joined by their log-sum-exps.
The window is part of the sequence that is cut: one softmax, and no second pass to merge.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from photon_kernels._attention_config import choose_attention_config
from photon_kernels._backend import current_device_of, next_power_of_2, with_dense_rows
from photon_kernels._compile_case import CompileCase
from photon_kernels._decode_tiles import attend_ring, locate_units, query_tile
from photon_kernels._tiles import tuned
from photon_kernels._triton_math import LOG2_E, attend_tile, finish_softmax
from photon_kernels.summary_decode.naive import Window

# Enough programs for two on each of an H100's or H200's 132 multiprocessors.
TARGET_PROGRAMS = 264
# A part shorter than this costs more in the combining pass than it gains.
MIN_UNITS_PER_SPLIT = 256
MAX_SPLITS = 64
# The configuration is that of a long stream at every length, so that nothing is compiled anew while it grows.
LONG_STREAM = 4096


def choose_num_splits(num_units: int, num_programs: int) -> int:
    """Parts per row, for a stream of up to ``num_units`` and ``num_programs`` = B * Hkv rows to serve."""
    wanted = -(-TARGET_PROGRAMS // max(num_programs, 1))
    return max(1, min(wanted, num_units // MIN_UNITS_PER_SPLIT, MAX_SPLITS))


@triton.jit(do_not_specialize=["num_units", "num_entries", "num_splits", "pitch_pages"])
def summary_split_kernel(
    q,
    k,
    v,
    lengths,
    starts,
    unit_bias,
    rows,
    pages,
    near_k,
    near_v,
    near_order,
    near_first,
    near_last,
    out,
    lse,
    scale_log2,
    num_positions,
    num_units,
    num_entries,
    num_sinks,
    num_splits,
    stride_qb,
    stride_qh,
    stride_qq,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    pitch_pages,
    stride_near_kb,
    stride_near_kh,
    stride_near_kn,
    stride_near_vb,
    stride_near_vh,
    stride_near_vn,
    pitch_order,
    HAS_ROWS: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    PER_PAGE: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Program ``(b, h, t * num_splits + s)`` attends from the t-th tile of queries to part s of row b.

    Writes ``out [B, Hq, Q, S, D]`` and ``lse [B, Hq, Q, S]``. The parts share out the tiles of the window and then of
    the stream. PER_PAGE is the number of units per page, 0 for a stream in one piece.
    """
    # 64 bits from here on: a cache may have more than 2^31 elements.
    row = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1).to(tl.int64)
    query_block = tl.program_id(2) // num_splits
    split = tl.program_id(2) % num_splits
    cache_row = row
    if HAS_ROWS:
        cache_row = tl.load(rows + row).to(tl.int64)
    heads, positions, is_query = query_tile(query_block, kv_head, num_positions, GROUP, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    in_head = dims < HEAD_DIM
    queries = tl.load(
        q + row * stride_qb + heads[:, None] * stride_qh + positions[:, None] * stride_qq + dims[None, :],
        mask=is_query[:, None] & in_head[None, :],
        other=0.0,
    )

    # Units that any of the queries sees, from the start of a tile.
    length = tl.load(lengths + row * num_positions + positions, mask=is_query, other=0).to(tl.int32)
    stop = tl.minimum(tl.max(length, 0), num_units)
    first_unit = 0
    if HAS_STARTS:
        start = tl.load(starts + row * num_positions + positions, mask=is_query, other=2147483647).to(tl.int32)
        first_unit = tl.maximum(tl.min(start, 0), 0) // BLOCK_N * BLOCK_N
    near_tiles = 0
    if HAS_WINDOW:
        near_tiles = tl.cdiv(num_entries, BLOCK_N)
    # Each row is cut by its own length, in whole tiles, so that its parts are equally long.
    tiles = near_tiles + tl.cdiv(tl.maximum(stop - first_unit, 0), BLOCK_N)
    tiles_per_split = tl.cdiv(tiles, num_splits)
    low = split * tiles_per_split
    high = tl.minimum(low + tiles_per_split, tiles)

    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if HAS_WINDOW:
        last = tl.load(near_last + row * num_positions + positions, mask=is_query, other=-1)
        peak, total, acc = attend_ring(
            low * BLOCK_N,
            tl.minimum(high, near_tiles) * BLOCK_N,
            queries,
            near_k + cache_row * stride_near_kb + kv_head * stride_near_kh,
            near_v + cache_row * stride_near_vb + kv_head * stride_near_vh,
            near_order + cache_row * pitch_order,
            tl.load(near_first + row),
            last,
            tl.max(last, 0),
            num_entries,
            num_sinks,
            stride_near_kn,
            stride_near_vn,
            in_head,
            scale_log2,
            peak,
            total,
            acc,
            BLOCK_N,
            BLOCK_D,
        )

    begin = first_unit + (tl.maximum(low, near_tiles) - near_tiles) * BLOCK_N
    end = first_unit + (tl.maximum(high, near_tiles) - near_tiles) * BLOCK_N
    keys_start = k + kv_head * stride_kh
    values_start = v + kv_head * stride_vh
    page_start = pages + cache_row * pitch_pages
    for unit in range(begin, end, BLOCK_N):
        units = unit + tl.arange(0, BLOCK_N)
        alive = units < stop
        block, inside = locate_units(unit, units, alive, page_start, cache_row, PER_PAGE, BLOCK_N)
        mask = alive[:, None] & in_head[None, :]
        key_rows = keys_start + block * stride_kb + inside * stride_kn
        value_rows = values_start + block * stride_vb + inside * stride_vn
        keys = tl.load(key_rows[:, None] + dims[None, :], mask=mask, other=0.0)
        values = tl.load(value_rows[:, None] + dims[None, :], mask=mask, other=0.0)
        visible = units[None, :] < tl.minimum(length, stop)[:, None]
        if HAS_STARTS:
            visible = visible & (units[None, :] >= start[:, None])
        bias = tl.zeros([BLOCK_N], tl.float32)
        if HAS_BIAS:
            bias = tl.load(unit_bias + units, mask=alive, other=0.0).to(tl.float32) * LOG2_E
        offset = tl.where(visible, bias[None, :], float("-inf"))
        peak, total, acc = attend_tile(queries, keys, values, offset, scale_log2, peak, total, acc)

    result, log_sum = finish_softmax(peak, total, acc)
    target = ((row * tl.num_programs(1) * GROUP + heads) * num_positions + positions) * num_splits + split
    tl.store(
        out + target[:, None] * HEAD_DIM + dims[None, :],
        result.to(out.dtype.element_ty),
        mask=is_query[:, None] & in_head[None, :],
    )
    tl.store(lse + target, log_sum, mask=is_query)


@triton.jit(do_not_specialize=["num_splits"])
def summary_combine_kernel(
    partial_out,
    partial_lse,
    out,
    lse,
    num_splits,
    HEAD_DIM: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Program ``i`` joins ``partial_out[i] [S, D]`` by ``partial_lse[i] [S]`` into ``out[i] [D]`` and ``lse[i]``."""
    row = tl.program_id(0).to(tl.int64)
    splits = tl.arange(0, BLOCK_S)
    dims = tl.arange(0, BLOCK_D)
    in_head = dims < HEAD_DIM
    is_split = splits < num_splits
    part_lse = tl.load(partial_lse + row * num_splits + splits, mask=is_split, other=float("-inf"))
    peak = tl.max(part_lse, 0)
    shift = tl.where(peak == float("-inf"), 0.0, peak)
    weights = tl.exp(part_lse - shift)
    total = tl.sum(weights, 0)
    divisor = tl.where(total == 0.0, 1.0, total)
    parts = tl.load(
        partial_out + (row * num_splits + splits)[:, None] * HEAD_DIM + dims[None, :],
        mask=is_split[:, None] & in_head[None, :],
        other=0.0,
    )
    result = tl.sum(weights[:, None] * parts, 0) / divisor
    tl.store(out + row * HEAD_DIM + dims, result.to(out.dtype.element_ty), mask=in_head)
    tl.store(lse + row, peak + tl.log(divisor))


def summary_decode_attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    scale: float,
    starts: Tensor | None = None,
    unit_bias: Tensor | None = None,
    rows: Tensor | None = None,
    pages: Tensor | None = None,
    window: Window | None = None,
    num_splits: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Output ``[B, Hq, Q, D]`` and log-sum-exp ``[B, Hq, Q]``; arguments as in ``summary_decode_attention``."""
    batch, num_heads, num_positions, head_dim = q.shape
    num_kv_heads, per_block = k.shape[1:3]
    group = num_heads // num_kv_heads
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    q, k, v, pages = (x if x is None else with_dense_rows(x) for x in (q, k, v, pages))
    num_units = per_block if pages is None else pages.shape[1] * per_block
    queries, size = group * num_positions, k.element_size()
    config = choose_attention_config(LONG_STREAM, queries, head_dim, size)
    config = tuned("summary_decode", config, q.device, queries=queries, dim=head_dim, bytes=size)
    query_blocks = triton.cdiv(group * num_positions, config.block_m)
    if num_splits is None:
        num_splits = choose_num_splits(num_units, batch * num_kv_heads * query_blocks)
    if num_splits == 1:
        partial_out, partial_lse = out, lse
    else:
        partial_out = torch.empty(*q.shape[:3], num_splits, head_dim, dtype=torch.float32, device=q.device)
        partial_lse = torch.empty(*q.shape[:3], num_splits, dtype=torch.float32, device=q.device)
    # A kernel wants a pointer even where it reads none.
    near = Window(k, v, lengths, lengths, lengths) if window is None else window
    near_k, near_v, near_order = (with_dense_rows(x) for x in near[:3])
    with current_device_of(q):
        summary_split_kernel[(batch, num_kv_heads, query_blocks * num_splits)](
            q,
            k,
            v,
            lengths.contiguous(),
            lengths if starts is None else starts.contiguous(),
            lengths if unit_bias is None else unit_bias.contiguous(),
            lengths if rows is None else rows.contiguous(),
            lengths if pages is None else pages,
            near_k,
            near_v,
            near_order,
            near.first_visible.contiguous(),
            near.last_visible.contiguous(),
            partial_out,
            partial_lse,
            scale * LOG2_E.value,
            num_positions,
            num_units,
            near_k.shape[2],
            near.num_sinks,
            num_splits,
            *q.stride()[:3],
            *k.stride()[:3],
            *v.stride()[:3],
            0 if pages is None else pages.stride(0),
            *near_k.stride()[:3],
            *near_v.stride()[:3],
            near_order.stride(0),
            HAS_ROWS=rows is not None,
            HAS_STARTS=starts is not None,
            HAS_BIAS=unit_bias is not None,
            HAS_WINDOW=window is not None,
            PER_PAGE=0 if pages is None else per_block,
            GROUP=group,
            HEAD_DIM=head_dim,
            BLOCK_N=config.block_n,
            BLOCK_M=config.block_m,
            BLOCK_D=config.block_d,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
        if num_splits > 1:
            summary_combine_kernel[(lse.numel(),)](
                partial_out,
                partial_lse,
                out,
                lse,
                num_splits,
                HEAD_DIM=head_dim,
                BLOCK_S=next_power_of_2(num_splits),
                BLOCK_D=config.block_d,
                num_warps=4,
            )
    return out, lse


class _Shape(NamedTuple):
    """A case to compile: what distinguishes the kernels that users of a model run."""

    dtype: str
    element_size: int
    num_positions: int
    group: int
    head_dim: int
    per_page: int
    window: bool
    starts: bool = False


COMPILED_SHAPES = [
    _Shape("bf16", 2, 1, 4, 64, per_page=16, window=True),
    _Shape("bf16", 2, 1, 4, 64, per_page=0, window=True),
    _Shape("bf16", 2, 1, 4, 128, per_page=64, window=True),
    _Shape("bf16", 2, 1, 8, 128, per_page=16, window=False),
    _Shape("bf16", 2, 4, 4, 128, per_page=512, window=False),
    _Shape("bf16", 2, 1, 4, 128, per_page=256, window=False, starts=True),
    _Shape("fp16", 2, 1, 32, 128, per_page=16, window=True),
    _Shape("fp32", 4, 1, 4, 128, per_page=16, window=True),
]


def compile_cases() -> Iterator[CompileCase]:
    """What ``photon_kernels.aot`` compiles."""
    for shape in COMPILED_SHAPES:
        config = choose_attention_config(
            LONG_STREAM, shape.group * shape.num_positions, shape.head_dim, shape.element_size
        )
        layout = f"page={shape.per_page}" if shape.per_page else "contiguous"
        extras = ("+window" if shape.window else "") + ("+starts" if shape.starts else "")
        strides = ("qb", "qh", "qq", "kb", "kh", "kn", "vb", "vh", "vn")
        near_strides = ("near_kb", "near_kh", "near_kn", "near_vb", "near_vh", "near_vn")
        yield CompileCase(
            name=f"summary_split {shape.dtype} Q={shape.num_positions} group={shape.group} D={shape.head_dim} "
            f"{layout}{extras}",
            kernel=summary_split_kernel,
            types={
                **dict.fromkeys(("q", "k", "v", "near_k", "near_v"), f"*{shape.dtype}"),
                **dict.fromkeys(("unit_bias", "out", "lse"), "*fp32"),
                **dict.fromkeys(("lengths", "starts", "rows", "pages"), "*i64"),
                **dict.fromkeys(("near_order", "near_first", "near_last"), "*i64"),
                "scale_log2": "fp32",
                **dict.fromkeys(("num_positions", "num_units", "num_entries", "num_sinks", "num_splits"), "i32"),
                **dict.fromkeys(("pitch_pages", "pitch_order"), "i32"),
                **{f"stride_{name}": "i32" for name in (*strides, *near_strides)},
            },
            constants={
                "HAS_ROWS": True,
                "HAS_STARTS": shape.starts,
                "HAS_BIAS": True,
                "HAS_WINDOW": shape.window,
                "PER_PAGE": shape.per_page,
                "GROUP": shape.group,
                "HEAD_DIM": shape.head_dim,
                "BLOCK_N": config.block_n,
                "BLOCK_M": config.block_m,
                "BLOCK_D": config.block_d,
            },
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    yield CompileCase(
        name=f"summary_combine bf16 splits={MAX_SPLITS} D=128",
        kernel=summary_combine_kernel,
        types={"partial_out": "*fp32", "partial_lse": "*fp32", "out": "*bf16", "lse": "*fp32", "num_splits": "i32"},
        constants={"HEAD_DIM": 128, "BLOCK_S": MAX_SPLITS, "BLOCK_D": 128},
        num_warps=4,
        num_stages=1,
    )
