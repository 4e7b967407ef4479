"""Triton kernel of the queries that read latents: a matrix product whose left operand is unrotated while loaded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from photon_kernels._backend import current_device_of, next_power_of_2, with_dense_rows
from photon_kernels._compile_case import CompileCase
from photon_kernels._triton_math import dot


@triton.jit
def latent_queries_kernel(
    query,
    heads,
    key_map,
    key_bias,
    cosine,
    sine,
    folded,
    added,
    num_rows,
    stride_qb,
    stride_qh,
    stride_ms,
    stride_mh,
    stride_md,
    stride_bs,
    stride_bh,
    stride_rb,
    CHUNK_SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROTATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Program ``(i, h * S + s, j)``: tile i of cell h's rows and heads, token s, tile j of the latent's numbers.

    Writes ``folded [n, H, S, C]`` and ``added [n, H, S]``, contiguous.
    """
    cell = tl.program_id(1) // CHUNK_SIZE
    token = tl.program_id(1) % CHUNK_SIZE
    members = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    alive = members < num_rows * GROUP
    row = members // GROUP
    place = cell * GROUP + members % GROUP
    dims = tl.arange(0, BLOCK_D)
    in_head = dims < HEAD_DIM
    numbers = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_latent = numbers < WIDTH

    head = tl.load(heads + place, mask=alive, other=0).to(tl.int64)
    start = query + row.to(tl.int64) * stride_qb + head * stride_qh
    mask = alive[:, None] & in_head[None, :]
    states = tl.load(start[:, None] + dims[None, :], mask=mask, other=0.0).to(tl.float32)
    if ROTATED > 0:
        # x cos - crossed sin, of which crossed pairs two dimensions; what lies beyond ROTATED stays.
        if INTERLEAVED:
            is_first = dims % 2 == 0
            partner = tl.where(is_first, dims + 1, dims - 1)
        else:
            is_first = dims < ROTATED // 2
            partner = tl.where(is_first, dims + ROTATED // 2, dims - ROTATED // 2)
        turned = dims < ROTATED
        mask = alive[:, None] & turned[None, :]
        crossed = tl.load(start[:, None] + partner[None, :], mask=mask, other=0.0).to(tl.float32)
        crossed = tl.where(is_first[None, :], -crossed, crossed)
        angle = row.to(tl.int64)[:, None] * stride_rb + dims[None, :]
        cos = tl.load(cosine + angle, mask=mask, other=1.0).to(tl.float32)
        sin = tl.load(sine + angle, mask=mask, other=0.0).to(tl.float32)
        states = states * cos - crossed * sin
    states = states.to(query.dtype.element_ty)

    target = (row.to(tl.int64) * (tl.num_programs(1) // CHUNK_SIZE * GROUP) + place) * CHUNK_SIZE + token
    matrix = key_map + token * stride_ms + cell * stride_mh + dims[:, None] * stride_md + numbers[None, :]
    matrix = tl.load(matrix, mask=in_head[:, None] & in_latent[None, :], other=0.0)
    found = dot(states, matrix, tl.zeros([BLOCK_M, BLOCK_C], tl.float32))
    tl.store(
        folded + target[:, None] * WIDTH + numbers[None, :],
        found.to(folded.dtype.element_ty),
        mask=alive[:, None] & in_latent[None, :],
    )
    if tl.program_id(2) == 0:
        bias = tl.load(key_bias + token * stride_bs + cell * stride_bh + dims, mask=in_head, other=0.0).to(tl.float32)
        tl.store(added + target, tl.sum(states.to(tl.float32) * bias[None, :], 1), mask=alive)


def latent_queries_triton(
    query: Tensor,
    heads: Tensor,
    key_map: Tensor,
    key_bias: Tensor,
    cosine: Tensor,
    sine: Tensor,
    is_interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    """``folded`` and ``bias``; arguments as in ``latent_queries``."""
    batch, _, head_dim = query.shape
    chunk_size, cells, _, width = key_map.shape
    folded = torch.empty(batch, len(heads), chunk_size, width, dtype=query.dtype, device=query.device)
    added = torch.empty(folded.shape[:3], dtype=torch.float32, device=query.device)
    if not batch:
        return folded, added
    query, key_map, key_bias, cosine, sine = map(with_dense_rows, (query, key_map, key_bias, cosine, sine))
    group = len(heads) // cells
    sizes = choose_sizes(batch * group, head_dim, width, query.element_size())
    grid = (triton.cdiv(batch * group, sizes.block_m), cells * chunk_size, triton.cdiv(width, sizes.block_c))
    with current_device_of(query):
        latent_queries_kernel[grid](
            query,
            heads.contiguous(),
            key_map,
            key_bias,
            cosine,
            sine,
            folded,
            added,
            batch,
            *query.stride()[:2],
            *key_map.stride()[:3],
            *key_bias.stride()[:2],
            cosine.stride(0) if cosine.shape[0] > 1 else 0,
            CHUNK_SIZE=chunk_size,
            GROUP=group,
            HEAD_DIM=head_dim,
            ROTATED=cosine.shape[-1],
            INTERLEAVED=is_interleaved,
            WIDTH=width,
            BLOCK_M=sizes.block_m,
            BLOCK_D=sizes.block_d,
            BLOCK_C=sizes.block_c,
            num_warps=sizes.num_warps,
        )
    return folded, added


class Sizes(NamedTuple):
    """Tile sizes (rows and heads, dimensions of a head, numbers of a latent) and warps."""

    block_m: int
    block_d: int
    block_c: int
    num_warps: int


def choose_sizes(members: int, head_dim: int, width: int, element_size: int) -> Sizes:
    """Configuration for `members` rows times heads of a cell: few work at a time, so narrow tiles spread it."""
    block_m = min(64 if element_size <= 2 else 16, max(16, next_power_of_2(members)))
    block_c = min(64 if element_size <= 2 else 16, max(16, next_power_of_2(width)))
    return Sizes(block_m, max(16, next_power_of_2(head_dim)), block_c, 4)


def compile_cases() -> Iterator[CompileCase]:
    """What ``photon_kernels.aot`` compiles: a cell of Llama-3.2-1B, several of Llama-3.1-8B, other rotations."""
    for name, dtype, group, head_dim, rotated, interleaved, chunk_size, cells, members in [
        ("one cell", "bf16", 4, 64, 64, False, 2, 1, 16),
        ("three cells", "bf16", 4, 128, 128, False, 2, 3, 128),
        ("two cells, apart, rotated in part", "bf16", 4, 128, 64, True, 4, 2, 32),
        ("one cell", "fp32", 4, 64, 64, False, 2, 1, 16),
    ]:
        width = (1 if "apart" in name else 2) * cells * head_dim
        sizes = choose_sizes(members, head_dim, width, 2 if dtype == "bf16" else 4)
        yield CompileCase(
            name=f"latent_queries {dtype} D={head_dim} S={chunk_size} {name}",
            kernel=latent_queries_kernel,
            types={
                **dict.fromkeys(("query", "key_map", "key_bias", "cosine", "sine", "folded"), f"*{dtype}"),
                "heads": "*i64",
                "added": "*fp32",
                "num_rows": "i32",
                **{f"stride_{stride}": "i32" for stride in ("qb", "qh", "ms", "mh", "md", "bs", "bh", "rb")},
            },
            constants={
                "CHUNK_SIZE": chunk_size,
                "GROUP": group,
                "HEAD_DIM": head_dim,
                "ROTATED": rotated,
                "INTERLEAVED": interleaved,
                "WIDTH": width,
                "BLOCK_M": sizes.block_m,
                "BLOCK_D": sizes.block_d,
                "BLOCK_C": sizes.block_c,
            },
            num_warps=sizes.num_warps,
            num_stages=1,
        )
