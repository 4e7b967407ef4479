"""Triton kernel of the windowed decode attention.

One program serves one (row, key head): the query heads that share the key head are the rows of its tile, and it walks
over the entries once with an online softmax. Invisible entries are not even read.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from photon_kernels._attention_config import choose_attention_config
from photon_kernels._backend import current_device_of, with_dense_rows
from photon_kernels._triton_math import LOG2_E, attend_tile, finish_softmax
from photon_kernels.aot import CompileCase


@triton.jit
def window_decode_kernel(
    q,
    k,
    v,
    order,
    first_visible,
    last_visible,
    rows,
    out,
    lse,
    scale_log2,
    num_entries,
    num_sinks,
    stride_qb,
    stride_qh,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    pitch_order,
    HAS_ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Program ``(b, h)`` writes ``out[b, h * GROUP : (h + 1) * GROUP]`` and the same of ``lse``; both contiguous."""
    # 64 bits from here on: a cache may have more than 2^31 elements.
    row = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1).to(tl.int64)
    cache_row = row
    if HAS_ROWS:
        cache_row = tl.load(rows + row).to(tl.int64)
    first = tl.load(first_visible + row)
    last = tl.load(last_visible + row)

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
    keys_start = k + cache_row * stride_kb + kv_head * stride_kh
    values_start = v + cache_row * stride_vb + kv_head * stride_vh
    order_start = order + cache_row * pitch_order

    peak = tl.full([BLOCK_G], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    for start in range(0, num_entries, BLOCK_N):
        entries = start + tl.arange(0, BLOCK_N)
        place = tl.load(order_start + entries, mask=entries < num_entries, other=-1)
        visible = (place >= 0) & (place <= last) & ((place >= first) | (entries < num_sinks))
        mask = visible[:, None] & in_head[None, :]
        keys = tl.load(keys_start + entries[:, None] * stride_kn + dims[None, :], mask=mask, other=0.0)
        values = tl.load(values_start + entries[:, None] * stride_vn + dims[None, :], mask=mask, other=0.0)
        offset = tl.where(visible, 0.0, float("-inf"))
        peak, total, acc = attend_tile(queries, keys, values, offset, scale_log2, peak, total, acc)

    result, log_sum = finish_softmax(peak, total, acc)
    target = row * tl.num_programs(1) * GROUP + heads
    tl.store(
        out + target[:, None] * HEAD_DIM + dims[None, :],
        result.to(out.dtype.element_ty),
        mask=in_group[:, None] & in_head[None, :],
    )
    tl.store(lse + target, log_sum, mask=in_group)


def window_decode_attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    order: Tensor,
    first_visible: Tensor,
    last_visible: Tensor,
    scale: float,
    num_sinks: int = 0,
    rows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Output ``[B, Hq, D]`` and log-sum-exp ``[B, Hq]``; arguments as in ``window_decode_attention``."""
    batch, num_heads, head_dim = q.shape
    num_kv_heads, num_entries = k.shape[1:3]
    group = num_heads // num_kv_heads
    out = torch.empty(batch, num_heads, head_dim, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, num_heads, dtype=torch.float32, device=q.device)
    if batch == 0:
        return out, lse
    q, k, v, order = (with_dense_rows(tensor) for tensor in (q, k, v, order))
    config = choose_attention_config(num_entries, group, head_dim, k.element_size())
    with current_device_of(q):
        window_decode_kernel[(batch, num_kv_heads)](
            q,
            k,
            v,
            order,
            first_visible.contiguous(),
            last_visible.contiguous(),
            # A kernel wants a pointer even where it reads none.
            order if rows is None else rows.contiguous(),
            out,
            lse,
            scale * LOG2_E.value,
            num_entries,
            num_sinks,
            *q.stride()[:2],
            *k.stride()[:3],
            *v.stride()[:3],
            order.stride(0),
            HAS_ROWS=rows is not None,
            GROUP=group,
            HEAD_DIM=head_dim,
            BLOCK_N=config.block_n,
            BLOCK_G=config.block_g,
            BLOCK_D=config.block_d,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return out, lse


def compile_cases() -> Iterator[CompileCase]:
    """What ``photon_kernels.aot`` compiles: (dtype, its bytes, entries, group, head dimension) as users have them."""
    shapes = [
        ("bf16", 2, 8, 4, 64),
        ("bf16", 2, 72, 4, 64),
        ("bf16", 2, 300, 8, 128),
        ("bf16", 2, 300, 1, 80),
        ("fp16", 2, 300, 32, 128),
        ("fp32", 4, 300, 4, 128),
    ]
    for dtype, element_size, num_entries, group, head_dim in shapes:
        config = choose_attention_config(num_entries, group, head_dim, element_size)
        strides = ("qb", "qh", "kb", "kh", "kn", "vb", "vh", "vn")
        yield CompileCase(
            name=f"window_decode {dtype} N={num_entries} group={group} D={head_dim}",
            kernel=window_decode_kernel,
            types={
                **dict.fromkeys(("q", "k", "v", "out"), f"*{dtype}"),
                **dict.fromkeys(("order", "first_visible", "last_visible", "rows"), "*i64"),
                "lse": "*fp32",
                "scale_log2": "fp32",
                "num_entries": "i32",
                "num_sinks": "i32",
                "pitch_order": "i32",
                **{f"stride_{name}": "i32" for name in strides},
            },
            constants={
                "HAS_ROWS": True,
                "GROUP": group,
                "HEAD_DIM": head_dim,
                "BLOCK_N": config.block_n,
                "BLOCK_G": config.block_g,
                "BLOCK_D": config.block_d,
            },
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
