"""What `Scheduler` and `PrefixCache` ask of a cache, without a model: rows, blocks and lengths are only counted."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass


@dataclass(eq=False)
class Slot:
    """A sequence's row, blocks and tokens fed."""

    row: int
    num_blocks: int = 0
    length: int = 0


@dataclass(frozen=True)
class Saved:
    """A sequence outside of the cache."""

    length: int


class FakeCache:
    """Rows and blocks of `block_size` tokens.

    Attributes:
        forked, closed: Slots in the order in which they were given out by `fork` and given back.
    """

    def __init__(self, num_rows: int, num_blocks: int, block_size: int = 4) -> None:
        self.free_rows, self.free_blocks, self.block_size = list(range(num_rows)), num_blocks, block_size
        self.forked: list[Slot] = []
        self.closed: list[Slot] = []

    def open_sequence(self) -> Slot | None:
        return Slot(self.free_rows.pop(0)) if self.free_rows else None

    def reserve(self, slot: Slot, tokens: int) -> bool:
        needed = max(0, -(-tokens // self.block_size) - slot.num_blocks)
        if needed > self.free_blocks:
            return False
        slot.num_blocks += needed
        self.free_blocks -= needed
        return True

    def fork(self, slot: Slot) -> Slot | None:
        # Nothing is shared here: a copy takes blocks of its own.
        blocks = -(-slot.length // self.block_size)
        if not self.free_rows or blocks > self.free_blocks:
            return None
        self.free_blocks -= blocks
        self.forked.append(Slot(self.free_rows.pop(0), blocks, slot.length))
        return self.forked[-1]

    def close(self, slot: Slot) -> None:
        assert Counter(self.closed)[slot] == 0, "closed twice"
        self.free_rows.append(slot.row)
        self.free_blocks += slot.num_blocks
        self.closed.append(slot)

    def swap_out(self, slot: Slot) -> Saved:
        self.close(slot)
        return Saved(slot.length)

    def swap_in(self, saved: Saved, tokens: int) -> Slot | None:
        slot = self.open_sequence()
        if slot is None:
            return None
        slot.length = saved.length
        if not self.reserve(slot, tokens):
            self.close(slot)
            return None
        return slot
