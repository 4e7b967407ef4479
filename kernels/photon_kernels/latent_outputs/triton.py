"""Triton kernel of the outputs over near and far keys: a matrix product, and the two parts of a softmax joined."""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from photon_kernels._backend import current_device_of, next_power_of_2, with_dense_rows
from photon_kernels._compile_case import CompileCase
from photon_kernels._triton_math import dot
from photon_kernels.latent_queries.triton import Sizes

_BLOCK_D = 32  # dimensions of a program: few rows give few programs


@triton.jit
def latent_outputs_kernel(
    mixed,
    mass,
    lse,
    heads,
    value_map,
    value_bias,
    out,
    out_lse,
    num_rows,
    stride_ms,
    stride_mh,
    stride_md,
    stride_bs,
    stride_bh,
    stride_ob,
    stride_oh,
    stride_lb,
    CHUNK_SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Program ``(i, h)``: tile i of cell h's rows and heads; ``mixed, mass, lse`` are contiguous."""
    cell = tl.program_id(1)
    members = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    alive = members < num_rows * GROUP
    row = (members // GROUP).to(tl.int64)
    place = cell * GROUP + members % GROUP
    source = row * (tl.num_programs(1) * GROUP) + place
    head = tl.load(heads + place, mask=alive, other=0).to(tl.int64)

    far_lse = tl.load(lse + source, mask=alive, other=float("-inf"))
    near_lse = tl.load(out_lse + row * stride_lb + head, mask=alive, other=float("-inf"))
    peak = tl.maximum(far_lse, near_lse)
    # Where neither part sees a key the peak is -inf, and -inf - -inf would be NaN.
    shift = tl.where(peak == float("-inf"), 0.0, peak)
    far_weight = tl.exp(far_lse - shift)
    near_weight = tl.exp(near_lse - shift)
    total = far_weight + near_weight
    divisor = tl.where(total == 0.0, 1.0, total)
    far_weight = far_weight / divisor
    near_weight = near_weight / divisor

    numbers = tl.arange(0, BLOCK_C)
    for begin in tl.static_range(0, HEAD_DIM, BLOCK_D):
        dims = begin + tl.arange(0, BLOCK_D)
        in_head = dims < HEAD_DIM
        far = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for step in range(0, CHUNK_SIZE * tl.cdiv(WIDTH, BLOCK_C)):
            token = step // tl.cdiv(WIDTH, BLOCK_C)
            columns = step % tl.cdiv(WIDTH, BLOCK_C) * BLOCK_C + numbers
            in_latent = columns < WIDTH
            sums = tl.load(
                mixed + ((source * CHUNK_SIZE + token) * WIDTH)[:, None] + columns[None, :],
                mask=alive[:, None] & in_latent[None, :],
                other=0.0,
            )
            matrix = value_map + token * stride_ms + cell * stride_mh
            matrix = tl.load(
                matrix + dims[:, None] * stride_md + columns[None, :],
                mask=in_head[:, None] & in_latent[None, :],
                other=0.0,
            )
            far = dot(sums, tl.trans(matrix), far)
        for slot in tl.static_range(CHUNK_SIZE):
            share = tl.load(mass + source * CHUNK_SIZE + slot, mask=alive, other=0.0)
            bias = tl.load(value_bias + slot * stride_bs + cell * stride_bh + dims, mask=in_head, other=0.0)
            far += share[:, None] * bias.to(tl.float32)[None, :]
        target = out + (row * stride_ob + head * stride_oh)[:, None] + dims[None, :]
        # What is not seen may be NaN: it is not loaded.
        seen = (alive & (near_weight > 0.0))[:, None] & in_head[None, :]
        near = tl.load(target, mask=seen, other=0.0).to(tl.float32)
        joined = near * near_weight[:, None] + far * far_weight[:, None]
        tl.store(target, joined.to(out.dtype.element_ty), mask=alive[:, None] & in_head[None, :])
    tl.store(out_lse + row * stride_lb + head, peak + tl.log(divisor), mask=alive)


def choose_sizes(members: int, head_dim: int, width: int, element_size: int) -> Sizes:
    """Configuration for `members` rows times heads of a cell."""
    block_m = min(64 if element_size <= 2 else 16, max(16, next_power_of_2(members)))
    block_c = min(64 if element_size <= 2 else 32, max(16, next_power_of_2(width)))
    return Sizes(block_m, min(_BLOCK_D, max(16, next_power_of_2(head_dim))), block_c, 4)


def latent_outputs_triton(
    mixed: Tensor,
    mass: Tensor,
    lse: Tensor,
    heads: Tensor,
    value_map: Tensor,
    value_bias: Tensor,
    out: Tensor,
    out_lse: Tensor,
) -> None:
    """Arguments as in ``latent_outputs``."""
    batch, _, head_dim = out.shape
    chunk_size, cells, _, width = value_map.shape
    if not batch:
        return
    if out.stride(-1) != 1 or out_lse.stride(-1) != 1:
        raise ValueError("the last dimension of out and out_lse must be contiguous: they are written in place")
    value_map, value_bias = with_dense_rows(value_map), with_dense_rows(value_bias)
    group = len(heads) // cells
    sizes = choose_sizes(batch * group, head_dim, width, out.element_size())
    with current_device_of(out):
        latent_outputs_kernel[triton.cdiv(batch * group, sizes.block_m), cells](
            mixed.contiguous(),
            mass.contiguous(),
            lse.contiguous(),
            heads.contiguous(),
            value_map,
            value_bias,
            out,
            out_lse,
            batch,
            *value_map.stride()[:3],
            *value_bias.stride()[:2],
            *out.stride()[:2],
            out_lse.stride(0),
            CHUNK_SIZE=chunk_size,
            GROUP=group,
            HEAD_DIM=head_dim,
            WIDTH=width,
            BLOCK_M=sizes.block_m,
            BLOCK_D=sizes.block_d,
            BLOCK_C=sizes.block_c,
            num_warps=sizes.num_warps,
        )


def compile_cases() -> Iterator[CompileCase]:
    """What ``photon_kernels.aot`` compiles: a cell of Llama-3.2-1B, several of Llama-3.1-8B."""
    for name, dtype, head_dim, chunk_size, cells, members in [
        ("one cell", "bf16", 64, 2, 1, 16),
        ("three cells", "bf16", 128, 2, 3, 128),
        ("two cells, apart", "bf16", 128, 4, 2, 32),
        ("one cell", "fp32", 64, 2, 1, 16),
    ]:
        width = (1 if "apart" in name else 2) * cells * head_dim
        sizes = choose_sizes(members, head_dim, width, 2 if dtype == "bf16" else 4)
        yield CompileCase(
            name=f"latent_outputs {dtype} D={head_dim} S={chunk_size} {name}",
            kernel=latent_outputs_kernel,
            types={
                **dict.fromkeys(("mixed", "value_map", "value_bias", "out"), f"*{dtype}"),
                **dict.fromkeys(("mass", "lse", "out_lse"), "*fp32"),
                "heads": "*i64",
                "num_rows": "i32",
                **{f"stride_{stride}": "i32" for stride in ("ms", "mh", "md", "bs", "bh", "ob", "oh", "lb")},
            },
            constants={
                "CHUNK_SIZE": chunk_size,
                "GROUP": 4,
                "HEAD_DIM": head_dim,
                "WIDTH": width,
                "BLOCK_M": sizes.block_m,
                "BLOCK_D": sizes.block_d,
                "BLOCK_C": sizes.block_c,
            },
            num_warps=sizes.num_warps,
            num_stages=2,
        )
