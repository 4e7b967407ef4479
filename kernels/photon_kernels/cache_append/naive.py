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
        target: Cache ``[R, H, N, D]``, written in place; with `pages`, R is the number of pages and N the entries of
            each.
        rows: Integer ``[n]``, the row of the cache (of `pages`) that each row of states goes to.
        entries: Integer ``[n, Q]``, the entry that each state goes to; negative: it is skipped.
        pages: Optional integer ``[rows of the cache, W]``: entry ``e`` of row ``r`` lies in page ``pages[r, e // N]``
            at ``e % N``.
    """

    source: Tensor
    target: Tensor
    rows: Tensor
    entries: Tensor
    pages: Tensor | None = None


def cache_append_naive(appends: Sequence[Append]) -> None:
    """Arguments as in ``cache_append``."""
    for source, target, rows, entries, pages in appends:
        row, position = (entries >= 0).nonzero(as_tuple=True)
        block, entry = rows[row], entries[row, position]
        if pages is not None:
            block, entry = pages[block, entry // target.shape[2]], entry % target.shape[2]
        with torch.no_grad():
            target[block, :, entry] = source[row, :, position].to(target.dtype)
