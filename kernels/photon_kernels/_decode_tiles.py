"""Device functions of the decode attentions: which queries a program serves, and where elements of a store lie.

The query heads that share a key head, at each of the row's query positions, are the rows of one tile: a decode step has
one position (the slots of a chunk are several), and matrix units want at least 16 rows.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def query_tile(tile, kv_head, num_positions, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """Head and position of each row of the ``tile``-th tile of queries, and whether the row is a query at all."""
    members = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    heads = kv_head * GROUP + members % GROUP
    return heads, members // GROUP, members < GROUP * num_positions


@triton.jit
def locate(first, elements, alive, table_start, cache_row, PER_BLOCK: tl.constexpr, BLOCK_N: tl.constexpr):
    """The block (of a store in one piece: the row) of the tile of ``elements [N]`` from ``first`` on, and where there.

    PER_BLOCK is the number of elements per block, 0 for a store in one piece. The block table is not read where
    elements are not ``alive``, unless the whole tile is in one block.
    """
    if PER_BLOCK == 0:
        block = cache_row
        inside = elements.to(tl.int64)
    elif PER_BLOCK % BLOCK_N == 0:
        block = tl.load(table_start + first // PER_BLOCK).to(tl.int64)
        inside = (first % PER_BLOCK + tl.arange(0, BLOCK_N)).to(tl.int64)
    else:
        block = tl.load(table_start + elements // PER_BLOCK, mask=alive, other=0).to(tl.int64)
        inside = (elements % PER_BLOCK).to(tl.int64)
    return block, inside
