"""Triton kernels of the decode attention over a growing store: split over the sequence, then combined.

A decode step offers B * Hkv independent rows, too few for a GPU at small batches, while the store is long. So each row
is cut into splits, attended to independently ("flash-decoding"); their outputs are joined by their log-sum-exps.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from photon_kernels._attention_config import MAX_SPLITS, choose_attention_config, choose_num_splits
from photon_kernels._backend import current_device_of, next_power_of_2, with_dense_rows
from photon_kernels._compile_case import CompileCase
from photon_kernels._decode_tiles import locate, query_tile
from photon_kernels._tiles import tuned
from photon_kernels._triton_math import LOG2_E, attend_tile, finish_softmax

# The configuration is that of a long store at every length, so that nothing is compiled anew while it grows.
LONG_STORE = 4096


@triton.jit(do_not_specialize=["num_sinks", "num_elements", "num_splits", "pitch_table"])
def paged_split_kernel(
    q,
    k,
    v,
    seen,
    start,
    rows,
    block_table,
    out,
    lse,
    scale_log2,
    num_sinks,
    num_positions,
    num_elements,
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
    pitch_table,
    HAS_START: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    PER_BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Program ``(b, h, t * num_splits + s)`` attends from the t-th tile of queries to split s of row b.

    Writes ``out [B, Hq, Q, S, D]`` and ``lse [B, Hq, Q, S]``. PER_BLOCK is the number of elements per block, 0 for a
    store in one piece.
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

    # Elements that any of the queries sees. Each row is cut by its own, in whole tiles, so that its splits are equal.
    count = tl.load(seen + row * num_positions + positions, mask=is_query, other=0).to(tl.int32)
    count = tl.minimum(count, num_elements)
    stop = tl.max(count, 0)
    length = stop
    if HAS_START:
        # Of whole tiles, those between the sinks and the first window are left out.
        low = tl.load(start + row * num_positions + positions, mask=is_query, other=num_elements).to(tl.int32)
        least = tl.maximum(tl.min(low, 0), 0)
        sinks_end = tl.cdiv(tl.minimum(num_sinks, stop), BLOCK_N) * BLOCK_N
        skipped = tl.maximum(least // BLOCK_N * BLOCK_N - sinks_end, 0)
        length = tl.maximum(stop - skipped, tl.minimum(sinks_end, stop))
    per_split = tl.cdiv(tl.cdiv(length, BLOCK_N), num_splits) * BLOCK_N
    begin = split * per_split
    end = tl.minimum(begin + per_split, length)

    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    keys_start = k + kv_head * stride_kh
    values_start = v + kv_head * stride_vh
    table_start = block_table + cache_row * pitch_table
    for tile in range(begin, end, BLOCK_N):
        first = tile
        if HAS_START:
            first += tl.where(tile < sinks_end, 0, skipped)
        elements = first + tl.arange(0, BLOCK_N)
        alive = elements < stop
        if HAS_START:
            alive = alive & ((elements >= least) | (elements < num_sinks))
        block, inside = locate(first, elements, alive, table_start, cache_row, PER_BLOCK, BLOCK_N)
        mask = alive[:, None] & in_head[None, :]
        key_rows = keys_start + block * stride_kb + inside * stride_kn
        value_rows = values_start + block * stride_vb + inside * stride_vn
        keys = tl.load(key_rows[:, None] + dims[None, :], mask=mask, other=0.0)
        values = tl.load(value_rows[:, None] + dims[None, :], mask=mask, other=0.0)
        visible = elements[None, :] < count[:, None]
        if HAS_START:
            visible = visible & ((elements[None, :] >= low[:, None]) | (elements[None, :] < num_sinks))
        offset = tl.where(visible, 0.0, float("-inf"))
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
def paged_combine_kernel(
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
    tl.store(lse + row, tl.where(total == 0.0, float("-inf"), shift + tl.log(divisor)))


def paged_decode_attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Tensor,
    scale: float,
    rows: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
    start: Tensor | None = None,
    num_sinks: int = 0,
) -> tuple[Tensor, Tensor]:
    """Output ``[B, Hq, Q, D]`` and log-sum-exps ``[B, Hq, Q]``; arguments as in ``paged_decode_attention``."""
    batch, num_heads, num_positions, head_dim = q.shape
    num_kv_heads, slots_per_block = k.shape[1:3]
    group = num_heads // num_kv_heads
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.full(q.shape[:3], float("-inf"), dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    q, k, v, block_table = (x if x is None else with_dense_rows(x) for x in (q, k, v, block_table))
    num_elements = slots_per_block if block_table is None else block_table.shape[1] * slots_per_block
    queries, size = group * num_positions, k.element_size()
    config = choose_attention_config(LONG_STORE, queries, head_dim, size)
    config = tuned("paged_decode", config, q.device, queries=queries, dim=head_dim, bytes=size)
    query_blocks = triton.cdiv(queries, config.block_m)
    if num_splits is None:
        num_splits = choose_num_splits(num_elements, batch * num_kv_heads * query_blocks)
    partial_out, partial_lse = out, lse
    if num_splits > 1:
        partial_lse = torch.empty(*q.shape[:3], num_splits, dtype=torch.float32, device=q.device)
        partial_out = torch.empty(*q.shape[:3], num_splits, head_dim, dtype=torch.float32, device=q.device)
    # A kernel wants a pointer even where it reads none.
    with current_device_of(q):
        paged_split_kernel[(batch, num_kv_heads, query_blocks * num_splits)](
            q,
            k,
            v,
            seen.contiguous(),
            seen if start is None else start.contiguous(),
            seen if rows is None else rows.contiguous(),
            seen if block_table is None else block_table,
            partial_out,
            partial_lse,
            scale * LOG2_E.value,
            num_sinks,
            num_positions,
            num_elements,
            num_splits,
            *q.stride()[:3],
            *k.stride()[:3],
            *v.stride()[:3],
            0 if block_table is None else block_table.stride(0),
            HAS_START=start is not None,
            HAS_ROWS=rows is not None,
            PER_BLOCK=0 if block_table is None else slots_per_block,
            GROUP=group,
            HEAD_DIM=head_dim,
            BLOCK_N=config.block_n,
            BLOCK_M=config.block_m,
            BLOCK_D=config.block_d,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
        if num_splits > 1:
            paged_combine_kernel[(q.shape[:3].numel(),)](
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
    per_block: int
    windowed: bool = False


COMPILED_SHAPES = [
    _Shape("bf16", 2, 1, 4, 64, per_block=256),
    _Shape("bf16", 2, 1, 4, 64, per_block=0),
    _Shape("bf16", 2, 1, 4, 128, per_block=256),
    _Shape("bf16", 2, 1, 8, 128, per_block=16),
    _Shape("bf16", 2, 4, 4, 128, per_block=64),
    _Shape("fp16", 2, 1, 32, 128, per_block=16),
    _Shape("fp32", 4, 1, 4, 128, per_block=16),
    _Shape("fp32", 4, 1, 3, 64, per_block=256),
    # vLLM's blocks of a window.
    _Shape("bf16", 2, 1, 3, 64, per_block=16, windowed=True),
    _Shape("bf16", 2, 1, 4, 128, per_block=16, windowed=True),
]


def compile_cases() -> Iterator[CompileCase]:
    """What ``photon_kernels.aot`` compiles."""
    for shape in COMPILED_SHAPES:
        config = choose_attention_config(
            LONG_STORE, shape.group * shape.num_positions, shape.head_dim, shape.element_size
        )
        layout = f"block={shape.per_block}" if shape.per_block else "contiguous"
        layout += " window" * shape.windowed
        strides = ("qb", "qh", "qq", "kb", "kh", "kn", "vb", "vh", "vn")
        yield CompileCase(
            name=f"paged_split {shape.dtype} Q={shape.num_positions} group={shape.group} D={shape.head_dim} {layout}",
            kernel=paged_split_kernel,
            types={
                **dict.fromkeys(("q", "k", "v"), f"*{shape.dtype}"),
                **dict.fromkeys(("out", "lse"), "*fp32"),
                **dict.fromkeys(("seen", "start", "rows"), "*i64"),
                "block_table": "*i32" if shape.windowed else "*i64",
                "scale_log2": "fp32",
                **dict.fromkeys(("num_sinks", "num_positions", "num_elements", "num_splits", "pitch_table"), "i32"),
                **{f"stride_{name}": "i32" for name in strides},
            },
            constants={
                "HAS_START": shape.windowed,
                "HAS_ROWS": not shape.windowed,
                "PER_BLOCK": shape.per_block,
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
        name=f"paged_combine bf16 splits={MAX_SPLITS} D=128",
        kernel=paged_combine_kernel,
        types={"partial_out": "*fp32", "partial_lse": "*fp32", "out": "*bf16", "lse": "*fp32", "num_splits": "i32"},
        constants={"HEAD_DIM": 128, "BLOCK_S": MAX_SPLITS, "BLOCK_D": 128},
        num_warps=4,
        num_stages=1,
    )
