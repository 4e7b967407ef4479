"""Triton kernel of the windowed decode attention.

One program serves one (row, key head) and walks over the slots once with an online softmax; slots that no query of
the row sees are not even read. With tiny sequences (an isolated chunk has at most R + C elements) a program is one or
two tiles, and the GPU is filled by rows and heads.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from photon_kernels._attention_config import choose_attention_config
from photon_kernels._backend import current_device_of, with_dense_rows
from photon_kernels._compile_case import CompileCase
from photon_kernels._decode_tiles import query_tile
from photon_kernels._tiles import tuned
from photon_kernels._triton_math import LOG2_E, attend_tile, finish_softmax


@triton.jit
def window_decode_kernel(
    q,
    k,
    v,
    index,
    first_visible,
    last_visible,
    rows,
    out,
    lse,
    scale_log2,
    num_positions,
    num_slots,
    num_sinks,
    stride_qb,
    stride_qh,
    stride_qq,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    pitch_index,
    HAS_ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Program ``(b, h, t)`` writes the t-th tile of queries of key head h in ``out`` and ``lse``, both contiguous."""
    # 64 bits from here on: a cache may have more than 2^31 elements.
    row = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1).to(tl.int64)
    cache_row = row
    if HAS_ROWS:
        cache_row = tl.load(rows + row).to(tl.int64)
    heads, positions, is_query = query_tile(tl.program_id(2), kv_head, num_positions, GROUP, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    in_head = dims < HEAD_DIM
    queries = tl.load(
        q + row * stride_qb + heads[:, None] * stride_qh + positions[:, None] * stride_qq + dims[None, :],
        mask=is_query[:, None] & in_head[None, :],
        other=0.0,
    )
    first = tl.load(first_visible + row)
    last = tl.load(last_visible + row * num_positions + positions, mask=is_query, other=-1)

    newest = tl.max(last, 0)
    keys_start = k + cache_row * stride_kb + kv_head * stride_kh
    values_start = v + cache_row * stride_vb + kv_head * stride_vh
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, num_slots, BLOCK_N):
        slots = start + tl.arange(0, BLOCK_N)
        held = tl.load(index + cache_row * pitch_index + slots, mask=slots < num_slots, other=-1)
        alive = (held >= 0) & (held <= newest) & ((held >= first) | (slots < num_sinks))
        mask = alive[:, None] & in_head[None, :]
        keys = tl.load(keys_start + slots[:, None] * stride_kn + dims[None, :], mask=mask, other=0.0)
        values = tl.load(values_start + slots[:, None] * stride_vn + dims[None, :], mask=mask, other=0.0)
        visible = alive[None, :] & (held[None, :] <= last[:, None])
        offset = tl.where(visible, 0.0, float("-inf"))
        peak, total, acc = attend_tile(queries, keys, values, offset, scale_log2, peak, total, acc)

    result, log_sum = finish_softmax(peak, total, acc)
    target = (row * tl.num_programs(1) * GROUP + heads) * num_positions + positions
    tl.store(
        out + target[:, None] * HEAD_DIM + dims[None, :],
        result.to(out.dtype.element_ty),
        mask=is_query[:, None] & in_head[None, :],
    )
    tl.store(lse + target, log_sum, mask=is_query)


def window_decode_attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    first_visible: Tensor,
    last_visible: Tensor,
    scale: float,
    num_sinks: int = 0,
    rows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Output ``[B, Hq, Q, D]`` and log-sum-exp ``[B, Hq, Q]``; arguments as in ``window_decode_attention``."""
    batch, num_heads, num_positions, head_dim = q.shape
    num_kv_heads, num_slots = k.shape[1:3]
    group = num_heads // num_kv_heads
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    q, k, v, index = (with_dense_rows(tensor) for tensor in (q, k, v, index))
    queries, size = group * num_positions, k.element_size()
    config = choose_attention_config(num_slots, queries, head_dim, size)
    shape = {"slots": num_slots, "queries": queries, "dim": head_dim, "bytes": size}
    config = tuned("window_decode", config, q.device, **shape)
    grid = (batch, num_kv_heads, triton.cdiv(group * num_positions, config.block_m))
    with current_device_of(q):
        window_decode_kernel[grid](
            q,
            k,
            v,
            index,
            first_visible.contiguous(),
            last_visible.contiguous(),
            # A kernel wants a pointer even where it reads none.
            index if rows is None else rows.contiguous(),
            out,
            lse,
            scale * LOG2_E.value,
            num_positions,
            num_slots,
            num_sinks,
            *q.stride()[:3],
            *k.stride()[:3],
            *v.stride()[:3],
            index.stride(0),
            HAS_ROWS=rows is not None,
            GROUP=group,
            HEAD_DIM=head_dim,
            BLOCK_N=config.block_n,
            BLOCK_M=config.block_m,
            BLOCK_D=config.block_d,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return out, lse


def compile_cases() -> Iterator[CompileCase]:
    """What ``photon_kernels.aot`` compiles: (dtype, its bytes, slots, queries, group, head dimension) in use."""
    shapes = [
        ("bf16", 2, 8, 1, 4, 64),
        ("bf16", 2, 72, 1, 4, 64),
        ("bf16", 2, 72, 8, 4, 128),
        ("bf16", 2, 72, 8, 8, 128),
        ("bf16", 2, 300, 1, 8, 128),
        ("bf16", 2, 300, 1, 1, 80),
        ("fp16", 2, 300, 1, 32, 128),
        ("fp32", 4, 300, 1, 4, 128),
    ]
    for dtype, element_size, num_slots, num_positions, group, head_dim in shapes:
        config = choose_attention_config(num_slots, group * num_positions, head_dim, element_size)
        strides = ("qb", "qh", "qq", "kb", "kh", "kn", "vb", "vh", "vn")
        yield CompileCase(
            name=f"window_decode {dtype} N={num_slots} Q={num_positions} group={group} D={head_dim}",
            kernel=window_decode_kernel,
            types={
                **dict.fromkeys(("q", "k", "v", "out"), f"*{dtype}"),
                **dict.fromkeys(("index", "first_visible", "last_visible", "rows"), "*i64"),
                "lse": "*fp32",
                "scale_log2": "fp32",
                **dict.fromkeys(("num_positions", "num_slots", "num_sinks", "pitch_index"), "i32"),
                **{f"stride_{name}": "i32" for name in strides},
            },
            constants={
                "HAS_ROWS": True,
                "GROUP": group,
                "HEAD_DIM": head_dim,
                "BLOCK_N": config.block_n,
                "BLOCK_M": config.block_m,
                "BLOCK_D": config.block_d,
            },
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
