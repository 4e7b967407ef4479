"""Triton kernels of the decode attention over latents: weights of all tokens, then sums of latents.

All heads and tokens of a row read the same latents, so they are the rows of one matrix product (128 of them for 32
heads and units of 4 tokens): the arithmetic per byte is near that of a GPU's matrix units. Their sums, 128 rows of the
latent's whole width, are more than a program's registers, and so the two products are two kernels, with a small one
between them for the softmax over all tiles. The weights, one number per head and token, lie in memory: for 32 heads,
units of 4 and 8 key heads of dimension 64 that is 1/8 of the latents' bytes, written once and read once for every key
head (from the L2 cache, where they fit).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from photon_kernels._attention_config import AttentionConfig, choose_num_splits
from photon_kernels._backend import current_device_of, next_power_of_2, with_dense_rows
from photon_kernels._decode_tiles import locate
from photon_kernels._tiles import tuned
from photon_kernels._triton_math import LOG2_E, dot
from photon_kernels.latent_decode.softmax import SOFTMAX_BLOCK, latent_softmax_kernel


def choose_latent_config(num_queries: int, stored_dim: int, element_size: int, bits: int = 16) -> AttentionConfig:
    """Configuration, its keys being units, for ``num_queries`` = H * S rows and heads of which `stored_dim` numbers (or
    bytes, of codes) are stored."""
    half_precision = element_size <= 2
    block_d = max(16, next_power_of_2(stored_dim))
    # Two sums of block_m x block_d stay in registers.
    longest = (128 if block_d <= 64 else 64) if half_precision else 16
    if bits < 16:  # and so do what codes are turned into, and the sums of second pieces
        longest = min(longest, 32)
    block_m = min(longest, next_power_of_2(num_queries))
    block_n = 64 if half_precision else 16
    num_warps = 8 if half_precision or bits == 16 else 4  # eight spill
    return AttentionConfig(block_n, max(16, block_m), block_d, num_warps, num_stages=3 if half_precision else 2)


@triton.jit
def decode(codes, piece: tl.constexpr, BITS: tl.constexpr, dtype: tl.constexpr):
    """Numbers of bytes, before their scale: of 4 bits the low halves (`piece` 0) or the high ones; exact in bf16."""
    if BITS == 4:
        return (((codes >> (4 * piece)) & 15).to(tl.float32) - 7.5).to(dtype)
    return (codes.to(tl.float32) - 127.5).to(dtype)


@triton.jit(do_not_specialize=["num_tiles", "capacity", "pitch_table", "first_token"])
def latent_weights_kernel(
    folded,
    bias,
    keys,
    values,
    key_scales,
    value_scales,
    visible,
    rows,
    block_table,
    weights,
    peaks,
    totals,
    scale_log2,
    num_queries,
    capacity,
    num_tiles,
    first_token,
    stride_fb,
    stride_fr,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_sb,
    stride_sh,
    stride_sn,
    pitch_table,
    HAS_ROWS: tl.constexpr,
    PER_BLOCK: tl.constexpr,
    CHUNK_SIZE: tl.constexpr,
    JOINT: tl.constexpr,
    BITS: tl.constexpr,
    PIECES: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Program ``(n, t, b)``: row b, tile t of its queries and tokens, tile n of its units.

    Writes ``weights [B, R, capacity]``, 2 to the logits minus their largest in the tile, and ``peaks, totals [B, R,
    tiles]``, that largest and the weights' sum; of tiles without a visible unit only the peaks (-inf) and totals (0).
    """
    row = tl.program_id(2).to(tl.int64)
    tile = tl.program_id(0)
    queries = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    is_query = queries < num_queries
    cache_row = row
    if HAS_ROWS:
        cache_row = tl.load(rows + row).to(tl.int64)
    dims = tl.arange(0, BLOCK_D)
    in_piece = dims < HEAD_DIM // PIECES
    unit = tile * BLOCK_N
    units = unit + tl.arange(0, BLOCK_N)
    stop = tl.minimum(tl.load(visible + row).to(tl.int32), capacity)
    alive = units < stop
    target = (row * num_queries + queries) * num_tiles + tile
    if unit < stop:
        block, inside = locate(unit, units, alive, block_table + cache_row * pitch_table, cache_row, PER_BLOCK, BLOCK_N)
        mask = alive[:, None] & in_piece[None, :]
        query_mask = is_query[:, None] & in_piece[None, :]
        products = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        query_rows = folded + row * stride_fb + queries[:, None] * stride_fr + dims[None, :]
        scale_rows = block * stride_sb + inside * stride_sn
        for half in tl.static_range(2 if JOINT else 1):
            if half == 0:
                stored = (keys + block * stride_kb + inside * stride_kn)[:, None] + dims[None, :]
                scales, stride_head = key_scales + scale_rows, stride_kh
            else:
                stored = (values + block * stride_vb + inside * stride_vn)[:, None] + dims[None, :]
                scales, stride_head = value_scales + scale_rows, stride_vh
            for head in range(KV_HEADS):
                query_head = query_rows + (half * KV_HEADS + head) * HEAD_DIM
                codes = tl.load(stored + head * stride_head, mask=mask, other=0)
                if BITS == 16:
                    query = tl.load(query_head, mask=query_mask, other=0.0)
                    products = dot(query, tl.trans(codes), products)
                else:
                    found = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
                    for piece in tl.static_range(PIECES):
                        query = tl.load(query_head + piece * (HEAD_DIM // PIECES), mask=query_mask, other=0.0)
                        numbers = decode(codes, piece, BITS, query.dtype)
                        found = dot(query, tl.trans(numbers), found)
                    factor = tl.load(scales + head * stride_sh, mask=alive, other=0.0).to(tl.float32)
                    products += found * factor[None, :]
        added = tl.load(bias + row * num_queries + queries, mask=is_query, other=0.0)
        token = units[None, :] * CHUNK_SIZE + (queries % CHUNK_SIZE)[:, None]
        logits = tl.where(
            alive[None, :] & (token >= first_token), (products + added[:, None]) * scale_log2, float("-inf")
        )
        peak = tl.max(logits, 1)
        shift = tl.where(peak == float("-inf"), 0.0, peak)
        weight = tl.exp2(logits - shift[:, None])
        tl.store(
            weights + (row * num_queries + queries)[:, None] * capacity + units[None, :],
            weight.to(weights.dtype.element_ty),
            mask=is_query[:, None] & (units < capacity)[None, :],
        )
        tl.store(peaks + target, peak, mask=is_query)
        tl.store(totals + target, tl.sum(weight, 1), mask=is_query)
    else:
        tl.store(peaks + target, tl.full([BLOCK_M], float("-inf"), tl.float32), mask=is_query)
        tl.store(totals + target, tl.zeros([BLOCK_M], tl.float32), mask=is_query)


@triton.jit(do_not_specialize=["num_tiles", "num_splits", "capacity", "pitch_table"])
def latent_mix_kernel(
    weights,
    factors,
    keys,
    values,
    key_scales,
    value_scales,
    visible,
    rows,
    block_table,
    mixed,
    num_queries,
    capacity,
    num_tiles,
    num_splits,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_sb,
    stride_sh,
    stride_sn,
    pitch_table,
    HAS_ROWS: tl.constexpr,
    PER_BLOCK: tl.constexpr,
    JOINT: tl.constexpr,
    BITS: tl.constexpr,
    PIECES: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Program ``(t * KV_HEADS + h, s, b)``: row b, split s of its units, tile t of its queries, head h of the halves.

    Writes ``mixed [S, B, R, C]``: the sums of latents weighted by ``weights`` times ``factors [B, R, tiles]``.
    """
    row = tl.program_id(2).to(tl.int64)
    split = tl.program_id(1)
    # Programs that read the same weights lie next to each other.
    head = (tl.program_id(0) % KV_HEADS).to(tl.int64)
    queries = tl.program_id(0) // KV_HEADS * BLOCK_M + tl.arange(0, BLOCK_M)
    is_query = queries < num_queries
    cache_row = row
    if HAS_ROWS:
        cache_row = tl.load(rows + row).to(tl.int64)
    dims = tl.arange(0, BLOCK_D)
    in_piece = dims < HEAD_DIM // PIECES
    stop = tl.minimum(tl.load(visible + row).to(tl.int32), capacity)
    # Each row is cut by its own length, in whole tiles, so that its splits are equally long.
    per_split = tl.cdiv(tl.cdiv(stop, BLOCK_N), num_splits) * BLOCK_N
    begin = split * per_split
    end = tl.minimum(begin + per_split, stop)
    # Sums of the halves' first pieces, and (4 bits) of their second ones.
    key_sum = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    value_sum = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    key_rest = key_sum
    value_rest = value_sum
    query_rows = row * num_queries + queries
    for unit in range(begin, end, BLOCK_N):
        units = unit + tl.arange(0, BLOCK_N)
        alive = units < stop
        block, inside = locate(unit, units, alive, block_table + cache_row * pitch_table, cache_row, PER_BLOCK, BLOCK_N)
        mask = alive[:, None] & in_piece[None, :]
        weight = tl.load(
            weights + query_rows[:, None] * capacity + units[None, :],
            mask=is_query[:, None] & alive[None, :],
            other=0.0,
        ).to(tl.float32)
        factor = tl.load(factors + query_rows * num_tiles + unit // BLOCK_N, mask=is_query, other=0.0)
        weight = weight * factor[:, None]
        scale_rows = block * stride_sb + head * stride_sh + inside * stride_sn
        if JOINT:
            stored = (keys + block * stride_kb + head * stride_kh + inside * stride_kn)[:, None] + dims[None, :]
            codes = tl.load(stored, mask=mask, other=0)
            if BITS == 16:
                key_sum = dot(weight, codes, key_sum)
            else:
                scaled = weight * tl.load(key_scales + scale_rows, mask=alive, other=0.0).to(tl.float32)[None, :]
                key_sum = dot(scaled, decode(codes, 0, BITS, weights.dtype.element_ty), key_sum)
                if PIECES == 2:
                    key_rest = dot(scaled, decode(codes, 1, BITS, weights.dtype.element_ty), key_rest)
        stored = (values + block * stride_vb + head * stride_vh + inside * stride_vn)[:, None] + dims[None, :]
        codes = tl.load(stored, mask=mask, other=0)
        if BITS == 16:
            value_sum = dot(weight, codes, value_sum)
        else:
            scaled = weight * tl.load(value_scales + scale_rows, mask=alive, other=0.0).to(tl.float32)[None, :]
            value_sum = dot(scaled, decode(codes, 0, BITS, weights.dtype.element_ty), value_sum)
            if PIECES == 2:
                value_rest = dot(scaled, decode(codes, 1, BITS, weights.dtype.element_ty), value_rest)
    half = KV_HEADS * HEAD_DIM
    target = ((split * tl.num_programs(2) + row) * num_queries + queries) * (2 * half if JOINT else half)
    target = mixed + (target + head * HEAD_DIM)[:, None] + dims[None, :]
    mask = is_query[:, None] & in_piece[None, :]
    if JOINT:
        tl.store(target, key_sum.to(mixed.dtype.element_ty), mask=mask)
        if PIECES == 2:
            tl.store(target + HEAD_DIM // 2, key_rest.to(mixed.dtype.element_ty), mask=mask)
        target += half
    tl.store(target, value_sum.to(mixed.dtype.element_ty), mask=mask)
    if PIECES == 2:
        tl.store(target + HEAD_DIM // 2, value_rest.to(mixed.dtype.element_ty), mask=mask)


def latent_decode_triton(
    folded: Tensor,
    bias: Tensor,
    keys: Tensor,
    values: Tensor,
    visible: Tensor,
    scale: float,
    first_token: int = 0,
    rows: Tensor | None = None,
    block_table: Tensor | None = None,
    scales: tuple[Tensor, Tensor] | None = None,
    bits: int = 16,
    num_splits: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The fields of a ``LatentMix``; arguments as in ``latent_decode``."""
    batch, num_heads, chunk_size, width = folded.shape
    kv_heads, slots_per_block, stored_dim = keys.shape[1:]
    pieces = 2 if bits == 4 else 1
    head_dim = stored_dim * pieces
    num_queries, device = num_heads * chunk_size, folded.device
    capacity = slots_per_block if block_table is None else block_table.shape[1] * slots_per_block
    if batch == 0 or capacity == 0:
        empty = torch.zeros(folded.shape[:3], dtype=torch.float32, device=device)
        return torch.zeros_like(folded), empty, empty[..., 0] - torch.inf
    keys, values, block_table = (x if x is None else with_dense_rows(x) for x in (keys, values, block_table))
    key_scales, value_scales = (keys, values) if scales is None else (each.contiguous() for each in scales)
    config = choose_latent_config(num_queries, stored_dim, folded.element_size(), bits)
    shape = {"queries": num_queries, "dim": head_dim, "bytes": folded.element_size(), "bits": bits}
    config = tuned("latent_decode", config, device, **shape)
    num_tiles, query_tiles = triton.cdiv(capacity, config.block_n), triton.cdiv(num_queries, config.block_m)
    if num_splits is None:
        num_splits = choose_num_splits(capacity, batch * query_tiles * kv_heads)
    weights = torch.empty(batch, num_queries, capacity, dtype=folded.dtype, device=device)
    peaks = torch.empty(batch, num_queries, num_tiles, dtype=torch.float32, device=device)
    totals = torch.empty_like(peaks)
    mass = torch.empty(batch, num_heads, chunk_size, dtype=torch.float32, device=device)
    lse = torch.empty(batch, num_heads, dtype=torch.float32, device=device)
    mixed_type = folded.dtype if num_splits == 1 else torch.float32
    mixed = torch.empty(num_splits, batch, num_queries, width, dtype=mixed_type, device=device)
    queries = folded.reshape(batch, num_queries, width)
    # A kernel wants a pointer even where it reads none.
    index = (
        visible.contiguous(),
        visible if rows is None else rows.contiguous(),
        visible if block_table is None else block_table,
    )
    strides = (*keys.stride()[:3], *values.stride()[:3], *key_scales.stride()[:3])
    strides += (0 if block_table is None else block_table.stride(0),)
    constants = {
        "HAS_ROWS": rows is not None,
        "PER_BLOCK": 0 if block_table is None else slots_per_block,
        "JOINT": width == 2 * kv_heads * head_dim,
        "BITS": bits,
        "PIECES": pieces,
        "KV_HEADS": kv_heads,
        "HEAD_DIM": head_dim,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_D": config.block_d,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
    with current_device_of(folded):
        latent_weights_kernel[(num_tiles, query_tiles, batch)](
            queries,
            bias.float().contiguous(),
            keys,
            values,
            key_scales,
            value_scales,
            *index,
            weights,
            peaks,
            totals,
            scale * LOG2_E.value,
            num_queries,
            capacity,
            num_tiles,
            first_token,
            *queries.stride()[:2],
            *strides,
            CHUNK_SIZE=chunk_size,
            **constants,
        )
        # The peaks become the tiles' factors.
        latent_softmax_kernel[num_heads, batch](
            peaks, totals, mass, lse, num_tiles, CHUNK_SIZE=chunk_size, BLOCK=SOFTMAX_BLOCK, num_warps=4
        )
        latent_mix_kernel[(query_tiles * kv_heads, num_splits, batch)](
            weights,
            peaks,
            keys,
            values,
            key_scales,
            value_scales,
            *index,
            mixed,
            num_queries,
            capacity,
            num_tiles,
            num_splits,
            *strides,
            **constants,
        )
    mixed = mixed[0] if num_splits == 1 else mixed.sum(dim=0).to(folded.dtype)
    return mixed.view(folded.shape), mass, lse
