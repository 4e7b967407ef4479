"""Pages for what grows with a text: one table for all stacks, each storing its own number of entries per page.

A page covers `page_tokens` tokens of one sequence, a whole number of meta-contexts. A stack with one entry per S tokens
keeps ``page_tokens / S`` entries of it. Pages are counted by reference, so that sequences with a common prefix share
them; a page that is not full belongs to one sequence alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from photon_train.models.attention_photon import KeyValue
from photon_train.models.cache_photon import StackCache


@dataclass(eq=False)
class Held:
    """A sequence's place in the cache.

    Attributes:
        row: Its row of everything bounded.
        pages: Its pages, in order.
        length: Tokens fed.
    """

    row: int
    pages: list[int] = field(default_factory=list)
    length: int = 0


@dataclass(frozen=True)
class Saved:
    """A sequence's whole state outside the cache: bounded tensors, page contents, and tokens fed."""

    row: list[torch.Tensor]
    pages: list[torch.Tensor]
    length: int


class PagePool:
    """Which pages are free, and how many holders each of the others has."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self.holders = [0] * num_pages
        self._free = list(range(num_pages - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self, count: int) -> list[int] | None:
        """`count` pages with one holder each; None if there are not as many."""
        if count > len(self._free):
            return None
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self.holders[page] = 1
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """One more holder for each page."""
        for page in pages:
            self.holders[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """One holder less for each page; those without are free again."""
        for page in pages:
            self.holders[page] -= 1
            if self.holders[page] == 0:
                self._free.append(page)


class PageTable:
    """The pages of every row on the device, ``[rows, width]``; the width grows with the longest sequence.

    Attributes:
        bound: Pages per row that the next pass reads.
        rounded: Whether `bound` takes few values only.
    """

    def __init__(self, num_rows: int, device: torch.device) -> None:
        self.pages = torch.zeros(num_rows, 1, dtype=torch.long, device=device)
        self.bound, self.rounded = 0, False

    def set(self, held: Held, first: int = 0) -> None:
        """Take over the pages of a sequence from the first-th on."""
        missing = len(held.pages) - self.pages.shape[1]
        if missing > 0:
            self.widen(self.pages.shape[1] + max(missing, self.pages.shape[1]))
        new = torch.tensor(held.pages[first:], dtype=torch.long, device=self.pages.device)
        self.pages[held.row, first : len(held.pages)] = new

    def widen(self, width: int) -> None:
        """Make room for `width` pages per row."""
        self.pages = torch.nn.functional.pad(self.pages, (0, max(0, width - self.pages.shape[1])))

    def begin(self, held: Iterable[Held]) -> None:
        """Announce the sequences of the next pass: reads return as many pages as the longest of them has."""
        self.bound = max(len(one.pages) for one in held)
        if self.rounded:
            # Two leading bits: 1, 2, 3, 4, 6, 8, 12, ...; entries of pages that a row does not have are masked.
            unit = 1 << max(0, self.bound.bit_length() - 2)
            self.bound = min(-(-self.bound // unit) * unit, self.pages.shape[1])


class PagedStack(StackCache):
    """A growing stack in pages, ``[pages, Hkv, entries, D]`` per layer.

    It reads and writes like the `StackCache` of `PhotonCache`: element i of a row is its i-th entry. On the torch path
    a read gathers the rows' pages into one tensor (a copy of what grows, a few percent of a dense model's keys);
    kernels read the pages in place.

    Attributes:
        per_page: Entries per page.
        counts: Entries written, by row, ``[rows]``.
    """

    def __init__(self, layers: Iterable[int], table: PageTable, per_page: int) -> None:
        super().__init__(layers, None)
        self.table, self.per_page = table, per_page
        self.counts = torch.zeros(table.pages.shape[0], dtype=torch.long, device=table.pages.device)

    def allocate(self, num_pages: int, heads: int, head_dim: int, like: torch.Tensor) -> None:
        for states in (self.keys, self.values):
            for layer in self.layers:
                states[layer] = like.new_zeros(num_pages, heads, self.per_page, head_dim)

    @property
    def size(self) -> int:
        return self.table.bound * self.per_page

    def held(self, rows: torch.Tensor) -> torch.Tensor:
        entry = torch.arange(self.size, device=rows.device)
        return torch.where(entry < self.counts[rows][:, None], entry, -1)

    def read(self, layer: int, rows: torch.Tensor) -> KeyValue:
        return self._gather(self.keys[layer], rows), self._gather(self.values[layer], rows)

    def operands(self, layer: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        return self.keys[layer], self.values[layer], self.table.pages[:, : self.table.bound]

    def place(self, rows: torch.Tensor, entries: torch.Tensor, order: torch.Tensor) -> None:
        """Announce elements; an element's entry is its index, and its page must have been reserved."""
        self.counts[rows] = order[:, -1] + 1

    def write(self, layer: int, rows: torch.Tensor, entries: torch.Tensor, key: torch.Tensor, value: torch.Tensor):
        self.scatter(layer, rows[:, None].expand_as(entries), entries, key.transpose(1, 2), value.transpose(1, 2))

    def scatter(self, layer: int, rows: torch.Tensor, entries: torch.Tensor, key: torch.Tensor, value: torch.Tensor):
        """Store ``key, value [..., Hkv, D]`` as ``entries [...]`` of ``rows [...]``."""
        page, inside = self.table.pages[rows, entries // self.per_page], entries % self.per_page
        self.keys[layer][page, :, inside] = key.detach().to(self.keys[layer].dtype)
        self.values[layer][page, :, inside] = value.detach().to(self.values[layer].dtype)

    def clear(self, rows: torch.Tensor) -> None:
        self.counts[rows] = 0

    def _gather(self, states: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        _, heads, entries, dim = states.shape
        pages = self.table.pages[rows, : self.table.bound]
        # One index per page and head: the copy comes out in the order that attention wants.
        which = pages[:, None, :] * heads + torch.arange(heads, device=rows.device)[:, None]
        flat = states.view(-1, entries * dim).index_select(0, which.flatten())
        return flat.view(rows.numel(), heads, self.table.bound * entries, dim)
