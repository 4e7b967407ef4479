"""Tile sizes and launch options of the attention kernels."""

from __future__ import annotations

from typing import NamedTuple

from photon_kernels._backend import next_power_of_2


class AttentionConfig(NamedTuple):
    """Tile sizes (entries, query heads per key head, head dimension) and launch options."""

    block_n: int
    block_g: int
    block_d: int
    num_warps: int
    num_stages: int


def choose_attention_config(num_entries: int, group: int, head_dim: int, element_size: int) -> AttentionConfig:
    """Configuration for ``num_entries`` keys, ``group`` query heads per key head and elements of so many bytes.

    ``tl.dot`` wants at least 16 rows and 16 columns, hence the lower limits. Exact float32 products run on the ordinary
    arithmetic units and need many registers: with longer tiles or fewer warps ``photon_kernels.aot`` reports spills.
    """
    block_g = max(16, next_power_of_2(group))
    block_d = max(16, next_power_of_2(head_dim))
    half_precision = element_size <= 2
    longest = 64 if half_precision and block_d <= 128 else 16
    block_n = min(longest, max(16, next_power_of_2(num_entries)))
    if half_precision:
        num_warps = 4 if block_g * block_d < 4096 else 8
    else:
        num_warps = 8
    return AttentionConfig(
        block_n=block_n,
        block_g=block_g,
        block_d=block_d,
        num_warps=num_warps,
        # No more tiles in flight than there are.
        num_stages=min(3, -(-num_entries // block_n)) or 1,
    )
