"""Device functions of the decode attentions: which queries a program serves, and the pass over a ring buffer.

The query heads that share a key head, at each of the row's query positions, are the rows of one tile: a decode step has
one position (the slots of a chunk are several), and matrix units want at least 16 rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from photon_kernels._triton_math import attend_tile


@triton.jit
def query_tile(tile, kv_head, num_positions, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """Head and position of each row of the ``tile``-th tile of queries, and whether the row is a query at all."""
    members = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    heads = kv_head * GROUP + members % GROUP
    return heads, members // GROUP, members < GROUP * num_positions


@triton.jit
def attend_ring(
    begin,
    end,
    queries,
    keys_start,
    values_start,
    order_start,
    first,
    last,
    newest,
    num_entries,
    num_sinks,
    stride_kn,
    stride_vn,
    in_head,
    scale_log2,
    peak,
    total,
    acc,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Continue an online softmax over the entries ``begin ... end - 1`` of a ring buffer, in whatever order they lie.

    Args:
        first: Oldest visible place besides the sinks.
        last: Youngest visible place of each query, ``[M]``; newest: the largest of them. Other entries are not read.
    """
    dims = tl.arange(0, BLOCK_D)
    for start in range(begin, end, BLOCK_N):
        entries = start + tl.arange(0, BLOCK_N)
        place = tl.load(order_start + entries, mask=entries < num_entries, other=-1)
        alive = (place >= 0) & (place <= newest) & ((place >= first) | (entries < num_sinks))
        mask = alive[:, None] & in_head[None, :]
        keys = tl.load(keys_start + entries[:, None] * stride_kn + dims[None, :], mask=mask, other=0.0)
        values = tl.load(values_start + entries[:, None] * stride_vn + dims[None, :], mask=mask, other=0.0)
        visible = alive[None, :] & (place[None, :] <= last[:, None])
        offset = tl.where(visible, 0.0, float("-inf"))
        peak, total, acc = attend_tile(queries, keys, values, offset, scale_log2, peak, total, acc)
    return peak, total, acc


@triton.jit
def locate_units(unit, units, alive, page_start, cache_row, PER_PAGE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Where the tile of ``units [N]`` from ``unit`` on lies: its block of memory (a page, or the row) and places there.

    PER_PAGE is the number of units per page, 0 for a stream in one piece. Pages of units that are not ``alive`` are
    not read, unless the whole tile is in one page.
    """
    if PER_PAGE == 0:
        block = cache_row
        inside = units.to(tl.int64)
    elif PER_PAGE % BLOCK_N == 0:
        block = tl.load(page_start + unit // PER_PAGE).to(tl.int64)
        inside = (unit % PER_PAGE + tl.arange(0, BLOCK_N)).to(tl.int64)
    else:
        block = tl.load(page_start + units // PER_PAGE, mask=alive, other=0).to(tl.int64)
        inside = (units % PER_PAGE).to(tl.int64)
    return block, inside
