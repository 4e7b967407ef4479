"""What `Scheduler` and `PrefixCache` ask of a cache, without a model: rows, pages and lengths are only counted."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from types import SimpleNamespace


@dataclass(eq=False)
class Slot:
    """A sequence's row, pages and tokens fed."""

    row: int
    num_pages: int = 0
    length: int = 0


@dataclass(frozen=True)
class Saved:
    """A sequence outside of the cache."""

    length: int


class FakeCache:
    """Rows and pages of `page_tokens` tokens.

    Attributes:
        forked, closed: Slots in the order in which they were given out by `fork` and given back.
    """

    def __init__(self, num_rows: int, num_pages: int, page_tokens: int = 4, top_span: int = 4) -> None:
        self.free_rows, self.free_pages, self.page_tokens = list(range(num_rows)), num_pages, page_tokens
        self.config = SimpleNamespace(top_span=top_span)
        self.forked: list[Slot] = []
        self.closed: list[Slot] = []

    def open_sequence(self) -> Slot | None:
        return Slot(self.free_rows.pop(0)) if self.free_rows else None

    def reserve(self, slot: Slot, tokens: int) -> bool:
        needed = max(0, -(-tokens // self.page_tokens) - slot.num_pages)
        if needed > self.free_pages:
            return False
        slot.num_pages += needed
        self.free_pages -= needed
        return True

    def fork(self, slot: Slot) -> Slot | None:
        # Nothing is shared here: a copy takes pages of its own.
        pages = -(-slot.length // self.page_tokens)
        if not self.free_rows or pages > self.free_pages:
            return None
        self.free_pages -= pages
        self.forked.append(Slot(self.free_rows.pop(0), pages, slot.length))
        return self.forked[-1]

    def close(self, slot: Slot) -> None:
        assert Counter(self.closed)[slot] == 0, "closed twice"
        self.free_rows.append(slot.row)
        self.free_pages += slot.num_pages
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
