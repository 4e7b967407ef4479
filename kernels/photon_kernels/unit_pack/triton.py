"""Triton kernel that packs the unit leaving the window: a matrix product gathered from a ring, quantised as stored."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import triton
import triton.language as tl
from torch import Tensor

from photon_kernels._backend import current_device_of, next_power_of_2, with_dense_rows
from photon_kernels._compile_case import CompileCase
from photon_kernels._triton_math import dot

_BLOCK_M = 16  # rows of a program: matrix units want as many, and its weights are read once for them


@triton.jit
def quantised_codes(states, scale, LEVELS: tl.constexpr):
    """Codes of ``states [M, D]`` with a scale for each row; half of the `LEVELS` lie below zero."""
    codes = tl.floor(states / scale[:, None]) + LEVELS // 2
    return tl.minimum(tl.maximum(codes, 0.0), LEVELS - 1.0).to(tl.uint8)


@triton.jit
def nearest_bfloat16(numbers):
    """Positive float32 ``numbers`` rounded to what bfloat16 can hold, as torch does; the interpreter would truncate."""
    bits = numbers.to(tl.uint32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return rounded.to(tl.float32, bitcast=True)


@triton.jit
def store_vector(target, scales, first, second, alive, numbers, in_half, HALF: tl.constexpr, BITS: tl.constexpr):
    """Store vectors of which ``first, second [M, HALF]`` are the two halves, at pointers ``target, scales [M]``."""
    mask = alive[:, None] & in_half[None, :]
    place = target[:, None] + numbers[None, :]
    if BITS == 16:
        tl.store(place, first.to(target.dtype.element_ty), mask=mask)
        tl.store(place + HALF, second.to(target.dtype.element_ty), mask=mask)
    else:
        levels: tl.constexpr = 2**BITS
        peak = tl.maximum(tl.max(tl.abs(first), 1), tl.max(tl.abs(second), 1))
        # A vector of zeros keeps its codes finite; codes are made with the scale as it is stored.
        scale = nearest_bfloat16(tl.maximum(peak / (levels // 2), 1e-30))
        tl.store(scales, scale.to(scales.dtype.element_ty), mask=alive)
        low = quantised_codes(first, scale, levels)
        high = quantised_codes(second, scale, levels)
        if BITS == 4:
            tl.store(place, low | (high << 4), mask=mask)
        else:
            tl.store(place, low, mask=mask)
            tl.store(place + HALF, high, mask=mask)


@triton.jit
def add_product(total, states, weight, in_half, in_head):
    """``total [M, HALF]`` and ``states [M, D]`` times the rows at pointers ``weight [HALF, D]``."""
    return dot(states, tl.trans(tl.load(weight, mask=in_half[:, None] & in_head[None, :], other=0.0)), total)


@triton.jit
def unit_pack_kernel(
    keys,
    values,
    rows,
    slots,
    heads,
    cosine,
    sine,
    key_weight,
    value_weight,
    key_bias,
    value_bias,
    key_target,
    value_target,
    key_scales,
    value_scales,
    units,
    block_table,
    num_rows,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_rb,
    stride_rs,
    stride_wk,
    stride_wv,
    stride_tb,
    stride_th,
    stride_tn,
    stride_ub,
    stride_uh,
    stride_un,
    stride_sb,
    stride_sh,
    stride_sn,
    pitch_table,
    CHUNK_SIZE: tl.constexpr,
    CELLS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROTATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    JOINT: tl.constexpr,
    BITS: tl.constexpr,
    PER_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Program ``(i, h)``: tile i of the rows, the vectors of head h in both halves of their latents."""
    cell = tl.program_id(1)
    members = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    unit = tl.load(units + members, mask=members < num_rows, other=-1).to(tl.int64)
    alive = unit >= 0
    cache_row = tl.load(rows + members, mask=alive, other=0).to(tl.int64)
    half: tl.constexpr = HEAD_DIM // 2
    numbers = tl.arange(0, BLOCK_H)
    in_half = numbers < half
    outputs = (cell * HEAD_DIM + numbers).to(tl.int64)
    key_rows = key_weight + outputs[:, None] * stride_wk
    value_rows = value_weight + outputs[:, None] * stride_wv
    per_token: tl.constexpr = (2 if JOINT else 1) * CELLS * HEAD_DIM
    tiles: tl.constexpr = (HEAD_DIM + BLOCK_D - 1) // BLOCK_D
    # The two pieces of the first half's vector, and of the second's.
    key_low = tl.zeros([BLOCK_M, BLOCK_H], tl.float32)
    key_high = tl.zeros([BLOCK_M, BLOCK_H], tl.float32)
    value_low = tl.zeros([BLOCK_M, BLOCK_H], tl.float32)
    value_high = tl.zeros([BLOCK_M, BLOCK_H], tl.float32)
    for step in range(CHUNK_SIZE * CELLS * tiles):
        token = step // (CELLS * tiles)
        other = step // tiles % CELLS
        dims = step % tiles * BLOCK_D + tl.arange(0, BLOCK_D)
        in_head = dims < HEAD_DIM
        mask = alive[:, None] & in_head[None, :]
        head = tl.load(heads + other).to(tl.int64)
        slot = tl.load(slots + members * CHUNK_SIZE + token, mask=alive, other=0).to(tl.int64)
        source = keys + cache_row * stride_kb + head * stride_kh + slot * stride_kn
        states = tl.load(source[:, None] + dims[None, :], mask=mask, other=0.0)
        if ROTATED > 0:
            # x cos - crossed sin, of which crossed pairs two dimensions; what lies beyond ROTATED stays.
            if INTERLEAVED:
                is_first = dims % 2 == 0
                partner = tl.where(is_first, dims + 1, dims - 1)
            else:
                is_first = dims < ROTATED // 2
                partner = tl.where(is_first, dims + ROTATED // 2, dims - ROTATED // 2)
            turned = alive[:, None] & (dims < ROTATED)[None, :]
            crossed = tl.load(source[:, None] + partner[None, :], mask=turned, other=0.0).to(tl.float32)
            crossed = tl.where(is_first[None, :], -crossed, crossed)
            angle = (members.to(tl.int64) * stride_rb + token * stride_rs)[:, None] + dims[None, :]
            cos = tl.load(cosine + angle, mask=turned, other=1.0).to(tl.float32)
            sin = tl.load(sine + angle, mask=turned, other=0.0).to(tl.float32)
            states = (states.to(tl.float32) * cos - crossed * sin).to(keys.dtype.element_ty)
        column = (token * per_token + other * HEAD_DIM + dims)[None, :]
        key_low = add_product(key_low, states, key_rows + column, in_half, in_head)
        key_high = add_product(key_high, states, key_rows + half * stride_wk + column, in_half, in_head)
        if JOINT:
            value_low = add_product(value_low, states, value_rows + column, in_half, in_head)
            value_high = add_product(value_high, states, value_rows + half * stride_wv + column, in_half, in_head)
            column += CELLS * HEAD_DIM
        source = values + cache_row * stride_vb + head * stride_vh + slot * stride_vn
        states = tl.load(source[:, None] + dims[None, :], mask=mask, other=0.0)
        value_low = add_product(value_low, states, value_rows + column, in_half, in_head)
        value_high = add_product(value_high, states, value_rows + half * stride_wv + column, in_half, in_head)
        if JOINT:
            key_low = add_product(key_low, states, key_rows + column, in_half, in_head)
            key_high = add_product(key_high, states, key_rows + half * stride_wk + column, in_half, in_head)

    first = cell * HEAD_DIM + numbers
    dtype = keys.dtype.element_ty
    key_low += tl.load(key_bias + first, mask=in_half, other=0.0).to(tl.float32)[None, :]
    key_high += tl.load(key_bias + half + first, mask=in_half, other=0.0).to(tl.float32)[None, :]
    value_low += tl.load(value_bias + first, mask=in_half, other=0.0).to(tl.float32)[None, :]
    value_high += tl.load(value_bias + half + first, mask=in_half, other=0.0).to(tl.float32)[None, :]
    block = cache_row
    inside = unit
    if PER_BLOCK > 0:
        block = tl.load(block_table + cache_row * pitch_table + unit // PER_BLOCK, mask=alive, other=0).to(tl.int64)
        inside = unit % PER_BLOCK
    scale_place = block * stride_sb + cell * stride_sh + inside * stride_sn
    store_vector(
        key_target + block * stride_tb + cell * stride_th + inside * stride_tn,
        key_scales + scale_place,
        key_low.to(dtype).to(tl.float32),
        key_high.to(dtype).to(tl.float32),
        alive,
        numbers,
        in_half,
        half,
        BITS,
    )
    store_vector(
        value_target + block * stride_ub + cell * stride_uh + inside * stride_un,
        value_scales + scale_place,
        value_low.to(dtype).to(tl.float32),
        value_high.to(dtype).to(tl.float32),
        alive,
        numbers,
        in_half,
        half,
        BITS,
    )


def unit_pack_triton(
    keys: Tensor,
    values: Tensor,
    rows: Tensor,
    slots: Tensor,
    heads: Tensor,
    cosine: Tensor,
    sine: Tensor,
    weights: tuple[Tensor, Tensor],
    biases: tuple[Tensor, Tensor],
    targets: Sequence[Tensor],
    units: Tensor,
    block_table: Tensor | None = None,
    bits: int = 16,
    is_interleaved: bool = False,
) -> None:
    """Arguments as in ``unit_pack``."""
    if not len(rows):
        return
    if any(each.stride(-1) != 1 for each in (*targets[:2], keys, values)):
        raise ValueError("the last dimension of keys, values and targets must be contiguous: they stay where they are")
    scales = targets[2:] or targets  # a kernel wants a pointer even where it writes none
    if scales[0].stride() != scales[1].stride():
        raise ValueError(f"scales must have one layout, got strides {scales[0].stride()} and {scales[1].stride()}")
    cosine, sine = with_dense_rows(cosine), with_dense_rows(sine)
    weights, biases = tuple(map(with_dense_rows, weights)), tuple(map(with_dense_rows, biases))
    table = rows if block_table is None else with_dense_rows(block_table)
    head_dim, tokens = keys.shape[3], slots.shape[1]
    with current_device_of(keys):
        unit_pack_kernel[triton.cdiv(len(rows), _BLOCK_M), len(heads)](
            keys,
            values,
            rows.contiguous(),
            slots.contiguous(),
            heads.contiguous(),
            cosine,
            sine,
            *weights,
            *biases,
            *targets[:2],
            *scales,
            units.contiguous(),
            table,
            len(rows),
            *keys.stride()[:3],
            *values.stride()[:3],
            cosine.stride(0) if cosine.shape[0] > 1 else 0,
            cosine.stride(1),
            weights[0].stride(0),
            weights[1].stride(0),
            *targets[0].stride()[:3],
            *targets[1].stride()[:3],
            *scales[0].stride()[:3],
            0 if block_table is None else table.stride(0),
            CHUNK_SIZE=tokens,
            CELLS=len(heads),
            HEAD_DIM=head_dim,
            ROTATED=cosine.shape[-1],
            INTERLEAVED=is_interleaved,
            JOINT=weights[0].shape[1] == 2 * tokens * len(heads) * head_dim,
            BITS=bits,
            PER_BLOCK=0 if block_table is None else targets[0].shape[2],
            BLOCK_M=_BLOCK_M,
            BLOCK_D=choose_block_d(head_dim, keys.element_size()),
            BLOCK_H=max(16, next_power_of_2(head_dim // 2)),
            num_warps=4,
            num_stages=1,
        )


def choose_block_d(head_dim: int, element_size: int) -> int:
    """Dimensions of a head that are multiplied at a time: as many as registers hold."""
    return min(64 if element_size <= 2 else 16, max(16, next_power_of_2(head_dim)))


def compile_cases() -> Iterator[CompileCase]:
    """What ``photon_kernels.aot`` compiles: a cell of Llama-3.2-1B, several of Llama-3.1-8B, other formats."""
    for name, dtype, head_dim, rotated, tokens, cells, bits, per_block in [
        ("one cell", "bf16", 64, 64, 2, 1, 4, 128),
        ("three cells", "bf16", 128, 128, 2, 3, 4, 64),
        ("apart, rotated in part", "bf16", 128, 64, 1, 2, 8, 64),
        ("eight cells", "bf16", 64, 64, 4, 8, 16, 64),
        ("one cell", "fp32", 64, 64, 2, 1, 4, 0),
    ]:
        stored = dtype if bits == 16 else "u8"
        strides = ("kb", "kh", "kn", "vb", "vh", "vn", "rb", "rs", "wk", "wv", "tb", "th", "tn", "ub", "uh", "un")
        yield CompileCase(
            name=f"unit_pack {dtype} D={head_dim} S={tokens} {bits} bits {name}",
            kernel=unit_pack_kernel,
            types={
                **dict.fromkeys(("keys", "values", "cosine", "sine"), f"*{dtype}"),
                **dict.fromkeys(("key_weight", "value_weight", "key_bias", "value_bias"), f"*{dtype}"),
                **dict.fromkeys(("rows", "slots", "heads", "units", "block_table"), "*i64"),
                **dict.fromkeys(("key_target", "value_target"), f"*{stored}"),
                **dict.fromkeys(("key_scales", "value_scales"), f"*{stored}" if bits == 16 else "*bf16"),
                **dict.fromkeys(("num_rows", "pitch_table", "stride_sb", "stride_sh", "stride_sn"), "i32"),
                **{f"stride_{stride}": "i32" for stride in strides},
            },
            constants={
                "CHUNK_SIZE": tokens,
                "CELLS": cells,
                "HEAD_DIM": head_dim,
                "ROTATED": rotated,
                "INTERLEAVED": False,
                "JOINT": "apart" not in name,
                "BITS": bits,
                "PER_BLOCK": per_block,
                "BLOCK_M": _BLOCK_M,
                "BLOCK_D": choose_block_d(head_dim, 2 if dtype == "bf16" else 4),
                "BLOCK_H": head_dim // 2,
            },
            num_warps=4,
            num_stages=1,
        )
