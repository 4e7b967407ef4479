"""Triton kernel of the softmax between the two products of the decode attention over latents."""

from __future__ import annotations

import triton
import triton.language as tl

from photon_kernels._triton_math import LN_2

SOFTMAX_BLOCK = 256  # tiles that a program takes at a time


@triton.jit(do_not_specialize=["num_tiles"])
def latent_softmax_kernel(peaks, totals, mass, lse, num_tiles, CHUNK_SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Program ``(h, b)``: the softmax of head h of row b over the tiles of its tokens.

    Reads ``peaks, totals [B, H, S, tiles]``, writes ``mass [B, H, S]`` and ``lse [B, H]``, and in place of the peaks
    the factors that make the tiles' weights those of the whole softmax.
    """
    head = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    first = head * CHUNK_SIZE * num_tiles
    count = CHUNK_SIZE * num_tiles
    peak = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, count, BLOCK):
        tiles = begin + tl.arange(0, BLOCK)
        its_peak = tl.load(peaks + first + tiles, mask=tiles < count, other=float("-inf"))
        its_total = tl.load(totals + first + tiles, mask=tiles < count, other=0.0)
        higher = tl.maximum(peak, its_peak)
        # Nothing is seen while both are -inf, and -inf - -inf would be NaN.
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp2(peak - shift) + its_total * tl.exp2(its_peak - shift)
        peak = higher
    highest = tl.max(peak, 0)
    shift = tl.where(highest == float("-inf"), 0.0, highest)
    total = tl.sum(total * tl.exp2(peak - shift), 0)
    divisor = tl.where(total == 0.0, 1.0, total)
    tl.store(lse + head, (highest + tl.log2(divisor)) * LN_2)
    for token in tl.static_range(CHUNK_SIZE):
        share = tl.zeros([BLOCK], tl.float32)
        for begin in range(0, num_tiles, BLOCK):
            tiles = begin + tl.arange(0, BLOCK)
            places = first + token * num_tiles + tiles
            its_peak = tl.load(peaks + places, mask=tiles < num_tiles, other=float("-inf"))
            factor = tl.exp2(its_peak - shift) / divisor
            share += factor * tl.load(totals + places, mask=tiles < num_tiles, other=0.0)
            tl.store(peaks + places, factor, mask=tiles < num_tiles)
        tl.store(mass + head * CHUNK_SIZE + token, tl.sum(share, 0))
