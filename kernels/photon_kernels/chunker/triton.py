"""Triton kernel of the chunker: a matrix product whose left operand is gathered while it is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from photon_kernels._backend import current_device_of, next_power_of_2, with_dense_rows
from photon_kernels._compile_case import CompileCase
from photon_kernels._tiles import tuned
from photon_kernels._triton_math import dot


class ChunkerConfig(NamedTuple):
    """Tile sizes (rows, outputs, summands) and launch options."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


def choose_chunker_config(num_rows: int, width: int, element_size: int) -> ChunkerConfig:
    """Configuration for ``num_rows`` closing chunks of states with ``width`` elements of so many bytes.

    In a decode step few rows close and reading the weight is the work, so narrow tiles of outputs spread it over many
    programs (about one per multiprocessor for the widths in use); with many rows, larger tiles read it fewer times.
    """
    block_m = min(64, max(16, next_power_of_2(num_rows)))
    longest = 128 if element_size <= 2 else 32
    return ChunkerConfig(
        block_m=block_m,
        block_n=64 if block_m > 32 else 16 if width <= 2048 else 32,
        block_k=min(longest, max(16, next_power_of_2(width))),
        num_warps=4,
        num_stages=3,
    )


@triton.jit(do_not_specialize=["num_rows"])
def gather_chunk_project_kernel(
    states,
    rows,
    weight,
    scale,
    out,
    num_rows,
    num_outputs,
    stride_sb,
    stride_sc,
    stride_wo,
    CHUNK_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Program ``(i, j)`` writes the tile (i, j) of ``out [num_rows, num_outputs]``, which is contiguous."""
    picked = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    outputs = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_row = picked < num_rows
    is_output = outputs < num_outputs
    row = tl.load(rows + picked, mask=is_row, other=0).to(tl.int64)
    row_start = states + row * stride_sb
    weight_start = weight + outputs.to(tl.int64) * stride_wo

    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    # One flat loop over (position in the chunk, tile of its state): nested loops would drain the pipeline in between.
    tiles: tl.constexpr = (WIDTH + BLOCK_K - 1) // BLOCK_K
    for step in range(0, CHUNK_SIZE * tiles):
        position = step // tiles
        dims = (step % tiles) * BLOCK_K + tl.arange(0, BLOCK_K)
        in_state = dims < WIDTH
        left = tl.load(
            row_start[:, None] + (position * stride_sc + dims)[None, :],
            mask=is_row[:, None] & in_state[None, :],
            other=0.0,
        )
        right = tl.load(
            weight_start[:, None] + (position * WIDTH + dims)[None, :],
            mask=is_output[:, None] & in_state[None, :],
            other=0.0,
        )
        acc = dot(left, tl.trans(right), acc)

    acc *= tl.load(scale).to(tl.float32)
    tl.store(
        out + picked.to(tl.int64)[:, None] * num_outputs + outputs[None, :],
        acc.to(out.dtype.element_ty),
        mask=is_row[:, None] & is_output[None, :],
    )


def gather_chunk_project_triton(states: Tensor, rows: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """``[n, d_out]``; arguments as in ``gather_chunk_project``."""
    chunk_size, width = states.shape[1:]
    num_rows, num_outputs = rows.shape[0], weight.shape[0]
    out = torch.empty(num_rows, num_outputs, dtype=states.dtype, device=states.device)
    if num_rows == 0:
        return out
    states, weight = with_dense_rows(states), with_dense_rows(weight)
    config = choose_chunker_config(num_rows, width, states.element_size())
    # Numbers of rows with the same tile are one case.
    shape = {"rows": config.block_m, "width": width, "bytes": states.element_size()}
    config = tuned("chunker", config, states.device, **shape)
    grid = (triton.cdiv(num_rows, config.block_m), triton.cdiv(num_outputs, config.block_n))
    with current_device_of(states):
        gather_chunk_project_kernel[grid](
            states,
            rows.contiguous(),
            weight,
            scale,
            out,
            num_rows,
            num_outputs,
            *states.stride()[:2],
            weight.stride(0),
            CHUNK_SIZE=chunk_size,
            WIDTH=width,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return out


def compile_cases() -> Iterator[CompileCase]:
    """What ``photon_kernels.aot`` compiles: (dtype, its bytes, rows, chunk size, width) as users have them."""
    shapes = [("bf16", 2, 8, 4, 2048), ("bf16", 2, 256, 4, 4096), ("fp16", 2, 32, 8, 320), ("fp32", 4, 256, 4, 2048)]
    for dtype, element_size, num_rows, chunk_size, width in shapes:
        config = choose_chunker_config(num_rows, width, element_size)
        yield CompileCase(
            name=f"chunker {dtype} n={num_rows} C={chunk_size} d={width}",
            kernel=gather_chunk_project_kernel,
            types={
                **dict.fromkeys(("states", "weight", "out"), f"*{dtype}"),
                "rows": "*i64",
                "scale": "*fp32",
                "num_rows": "i32",
                "num_outputs": "i32",
                **{f"stride_{name}": "i32" for name in ("sb", "sc", "wo")},
            },
            constants={
                "CHUNK_SIZE": chunk_size,
                "WIDTH": width,
                "BLOCK_M": config.block_m,
                "BLOCK_N": config.block_n,
                "BLOCK_K": config.block_k,
            },
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
