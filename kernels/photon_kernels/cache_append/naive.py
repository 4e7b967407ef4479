"""Torch reference of the cache append."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Append(NamedTuple):
    """New states and where they go.

    Attributes:
        source: States ``[n, H, Q, D]``: keys or values of H heads at Q positions (an open chunk's states have H = 1).
        target: Cache ``[R, H, N, D]``, written in place; with `block_table`, R is the number of blocks and N the
            slots of each.
        rows: Integer ``[n]``, the row of the cache (of `block_table`) that each row of states goes to.
        slots: Integer ``[n, Q]``, the slot that each state goes to; negative: it is skipped.
        block_table: Optional integer ``[rows of the cache, W]``: slot ``s`` of row ``r`` lies in block
            ``block_table[r, s // N]`` at ``s % N``.
    """

    source: Tensor
    target: Tensor
    rows: Tensor
    slots: Tensor
    block_table: Tensor | None = None


def cache_append_naive(appends: Sequence[Append]) -> None:
    """Arguments as in ``cache_append``."""
    for source, target, rows, slots, block_table in appends:
        row, position = (slots >= 0).nonzero(as_tuple=True)
        block, slot = rows[row], slots[row, position]
        if block_table is not None:
            block, slot = block_table[block, slot // target.shape[2]], slot % target.shape[2]
        with torch.no_grad():
            target[block, :, slot] = source[row, :, position].to(target.dtype)
