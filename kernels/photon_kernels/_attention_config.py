"""Tile sizes, launch options and numbers of splits of the attention kernels."""

from __future__ import annotations

from typing import NamedTuple

from photon_kernels._backend import next_power_of_2

# Longer tiles of queries need more registers than there are; what is longer goes to several programs.
MAX_BLOCK_M = 64
# Enough programs for two on each of an H100's or H200's 132 multiprocessors.
TARGET_PROGRAMS = 264
# A split shorter than this costs more in the combining pass than it gains.
MIN_PER_SPLIT = 256
MAX_SPLITS = 64


class AttentionConfig(NamedTuple):
    """Tile sizes (keys, queries that share a key head, head dimension) and launch options."""

    block_n: int
    block_m: int
    block_d: int
    num_warps: int
    num_stages: int


def choose_attention_config(num_keys: int, num_queries: int, head_dim: int, element_size: int) -> AttentionConfig:
    """Configuration for ``num_keys`` keys and ``num_queries`` (heads times positions) per key head.

    ``tl.dot`` wants at least 16 rows and 16 columns, hence the lower limits. Exact float32 products run on the ordinary
    arithmetic units and need many registers: with longer tiles or fewer warps ``photon_kernels.aot`` reports spills.
    """
    half_precision = element_size <= 2
    block_d = max(16, next_power_of_2(head_dim))
    block_m = min(MAX_BLOCK_M if half_precision else 32, max(16, next_power_of_2(num_queries)))
    longest = 64 if half_precision and block_d <= 128 else 16
    block_n = min(longest, max(16, next_power_of_2(num_keys)))
    if half_precision:
        num_warps = 4 if block_m * block_d <= 4096 else 8
    else:
        num_warps = 8
    return AttentionConfig(
        block_n=block_n,
        block_m=block_m,
        block_d=block_d,
        num_warps=num_warps,
        # No more tiles in flight than there are.
        num_stages=min(3, -(-num_keys // block_n)) or 1,
    )


def choose_num_splits(num_elements: int, num_programs: int) -> int:
    """Parts per row, for a store of up to ``num_elements`` and ``num_programs`` that serve it whole."""
    wanted = -(-TARGET_PROGRAMS // max(num_programs, 1))
    return max(1, min(wanted, num_elements // MIN_PER_SPLIT, MAX_SPLITS))
