"""Triton kernels of the decode attention over summaries: split over the sequence, then combined.

A decode step offers B * Hkv independent rows, too few for a GPU at small batches, while the stream is long. So each row
is cut into parts that are attended to independently ("flash-decoding"); their outputs are joined by their log-sum-exps.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from photon_kernels._attention_config import choose_attention_config
from photon_kernels._backend import current_device_of, next_power_of_2, with_dense_rows
from photon_kernels._triton_math import LOG2_E, attend_tile, finish_softmax
from photon_kernels.aot import CompileCase

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


@triton.jit(do_not_specialize=["num_units"])
def summary_split_kernel(
    q,
    k,
    v,
    lengths,
    unit_bias,
    rows,
    out,
    lse,
    scale_log2,
    num_units,
    stride_qb,
    stride_qh,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    HAS_ROWS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Program ``(b, h, s)`` attends to part s of row b; writes ``out [B, Hq, S, D]`` and ``lse [B, Hq, S]``."""
    # 64 bits from here on: a cache may have more than 2^31 elements.
    row = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    num_splits = tl.num_programs(2)
    cache_row = row
    if HAS_ROWS:
        cache_row = tl.load(rows + row).to(tl.int64)
    # Each row is cut by its own length, in whole tiles, so that its parts are equally long.
    length = tl.minimum(tl.load(lengths + row), num_units).to(tl.int32)
    units_per_split = tl.cdiv(tl.cdiv(length, BLOCK_N), num_splits) * BLOCK_N
    begin = split * units_per_split
    end = tl.minimum(begin + units_per_split, length)

    members = tl.arange(0, BLOCK_G)
    dims = tl.arange(0, BLOCK_D)
    in_group = members < GROUP
    in_head = dims < HEAD_DIM
    heads = kv_head * GROUP + members
    queries = tl.load(
        q + row * stride_qb + heads[:, None] * stride_qh + dims[None, :],
        mask=in_group[:, None] & in_head[None, :],
        other=0.0,
    )
    # The tile's start moves as a pointer: offsets within a tile then fit in 32 bits.
    keys_start = k + cache_row * stride_kb + kv_head * stride_kh + begin.to(tl.int64) * stride_kn
    values_start = v + cache_row * stride_vb + kv_head * stride_vh + begin.to(tl.int64) * stride_vn
    steps = tl.arange(0, BLOCK_N)

    peak = tl.full([BLOCK_G], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    for start in range(begin, end, BLOCK_N):
        visible = start + steps < end
        mask = visible[:, None] & in_head[None, :]
        keys = tl.load(keys_start + steps[:, None] * stride_kn + dims[None, :], mask=mask, other=0.0)
        values = tl.load(values_start + steps[:, None] * stride_vn + dims[None, :], mask=mask, other=0.0)
        offset = tl.where(visible, 0.0, float("-inf"))
        if HAS_BIAS:
            offset += tl.load(unit_bias + start + steps, mask=visible, other=0.0).to(tl.float32) * LOG2_E
        peak, total, acc = attend_tile(queries, keys, values, offset, scale_log2, peak, total, acc)
        keys_start += BLOCK_N * stride_kn
        values_start += BLOCK_N * stride_vn

    result, log_sum = finish_softmax(peak, total, acc)
    target = (row * tl.num_programs(1) * GROUP + heads) * num_splits + split
    tl.store(
        out + target[:, None] * HEAD_DIM + dims[None, :],
        result.to(out.dtype.element_ty),
        mask=in_group[:, None] & in_head[None, :],
    )
    tl.store(lse + target, log_sum, mask=in_group)


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
    unit_bias: Tensor | None = None,
    rows: Tensor | None = None,
    num_splits: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Output ``[B, Hq, D]`` and log-sum-exp ``[B, Hq]``; arguments as in ``summary_decode_attention``."""
    batch, num_heads, head_dim = q.shape
    num_kv_heads, num_units = k.shape[1:3]
    group = num_heads // num_kv_heads
    out = torch.empty(batch, num_heads, head_dim, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, num_heads, dtype=torch.float32, device=q.device)
    if batch == 0:
        return out, lse
    if num_splits is None:
        num_splits = choose_num_splits(num_units, batch * num_kv_heads)
    q, k, v = (with_dense_rows(tensor) for tensor in (q, k, v))
    config = choose_attention_config(LONG_STREAM, group, head_dim, k.element_size())
    if num_splits == 1:
        partial_out, partial_lse = out, lse
    else:
        partial_out = torch.empty(batch, num_heads, num_splits, head_dim, dtype=torch.float32, device=q.device)
        partial_lse = torch.empty(batch, num_heads, num_splits, dtype=torch.float32, device=q.device)
    with current_device_of(q):
        summary_split_kernel[(batch, num_kv_heads, num_splits)](
            q,
            k,
            v,
            lengths.contiguous(),
            # A kernel wants a pointer even where it reads none.
            lengths if unit_bias is None else unit_bias.contiguous(),
            lengths if rows is None else rows.contiguous(),
            partial_out,
            partial_lse,
            scale * LOG2_E.value,
            num_units,
            *q.stride()[:2],
            *k.stride()[:3],
            *v.stride()[:3],
            HAS_ROWS=rows is not None,
            HAS_BIAS=unit_bias is not None,
            GROUP=group,
            HEAD_DIM=head_dim,
            BLOCK_N=config.block_n,
            BLOCK_G=config.block_g,
            BLOCK_D=config.block_d,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
        if num_splits > 1:
            summary_combine_kernel[(batch * num_heads,)](
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


def compile_cases() -> Iterator[CompileCase]:
    """What ``photon_kernels.aot`` compiles: (dtype, its bytes, group, head dimension) as users have them."""
    shapes = [("bf16", 2, 4, 64), ("bf16", 2, 8, 128), ("fp16", 2, 32, 128), ("fp32", 4, 4, 128)]
    for dtype, element_size, group, head_dim in shapes:
        config = choose_attention_config(LONG_STREAM, group, head_dim, element_size)
        yield CompileCase(
            name=f"summary_split {dtype} group={group} D={head_dim}",
            kernel=summary_split_kernel,
            types={
                **dict.fromkeys(("q", "k", "v"), f"*{dtype}"),
                **dict.fromkeys(("unit_bias", "out", "lse"), "*fp32"),
                **dict.fromkeys(("lengths", "rows"), "*i64"),
                "scale_log2": "fp32",
                "num_units": "i32",
                **{f"stride_{name}": "i32" for name in ("qb", "qh", "kb", "kh", "kn", "vb", "vh", "vn")},
            },
            constants={
                "HAS_ROWS": True,
                "HAS_BIAS": True,
                "GROUP": group,
                "HEAD_DIM": head_dim,
                "BLOCK_N": config.block_n,
                "BLOCK_G": config.block_g,
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
