"""`PagedCache`: `PhotonCache` for many sequences that come and go.

What grows (unbounded encoders, memory layers' units, full-attention layers) lies in pages; what is bounded (rings,
open chunks, slots, bounded encoders) in one fixed row per sequence. A row and a page have the bytes that `accounting`
states.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from photon_train import accounting
from photon_train.errors import PhotonError
from photon_train.inference.pages import Held, PagedStack, PagePool, PageTable, Saved
from photon_train.models import PhotonCache, PhotonConfig, PhotonForCausalLM
from photon_train.models.cache_photon import StackCache

PAGE_TOKENS = 256


@dataclass(frozen=True)
class CacheLayout:
    """Sizes of a `PagedCache`.

    Attributes:
        num_rows: Sequences (running ones and kept prefixes) that it holds at a time.
        num_pages: Pages of all of them.
        page_tokens: Tokens that a page covers, a multiple of the meta-context.
        row_bytes, page_bytes: Bytes of one row and one page, from `accounting`.
    """

    num_rows: int
    num_pages: int
    page_tokens: int
    row_bytes: int
    page_bytes: int

    @classmethod
    def fit(
        cls,
        config: PhotonConfig,
        memory_bytes: int,
        num_rows: int,
        dtype_bytes: int,
        page_tokens: int | None = None,
        max_length: int | None = None,
    ) -> CacheLayout:
        """Rows first, then as many pages as `memory_bytes` leaves, but no more than rows of `max_length` can use.

        Raises:
            PhotonError: if the memory does not hold the rows and one page, or `page_tokens` cuts a meta-context.
        """
        span = config.top_span
        page_tokens = page_tokens or math.ceil(PAGE_TOKENS / span) * span
        if page_tokens % span:
            raise PhotonError(f"page_tokens={page_tokens} is not a multiple of the {span} tokens of a meta-context")
        empty = accounting.cache_bytes(config, 0, dtype_bytes)
        row_bytes = empty.constant + empty.buffers
        page_bytes = accounting.cache_bytes(config, page_tokens, dtype_bytes).growing
        most = num_rows * math.ceil((max_length or config.max_position_embeddings) / page_tokens)
        left = memory_bytes - num_rows * row_bytes
        num_pages = min(most, left // page_bytes) if page_bytes else most
        if left < 0 or num_pages < 1:
            need = num_rows * row_bytes + page_bytes
            raise PhotonError(
                f"memory={memory_bytes} does not hold {num_rows} sequences of {row_bytes} bytes and a page of "
                f"{page_bytes} bytes: give at least {need}, or lower max_sequences or max_prefixes"
            )
        return cls(num_rows, num_pages, page_tokens, row_bytes, page_bytes)

    @property
    def total_bytes(self) -> int:
        """Bytes of keys, values and buffers."""
        return self.num_rows * self.row_bytes + self.num_pages * self.page_bytes

    def pages_for(self, tokens: int) -> int:
        """Pages of a sequence of `tokens`."""
        return math.ceil(tokens / self.page_tokens)


class PagedCache(PhotonCache):
    """A pool of rows and pages; sequences are `Held` handles.

    Decoding reads and writes it like a `PhotonCache` of `num_rows` rows; `begin` announces whose turn it is.
    """

    def __init__(self, model: PhotonForCausalLM, layout: CacheLayout) -> None:
        super().__init__(model.config)
        self.layout, self.pool = layout, PagePool(layout.num_pages)
        self._free_rows = list(range(layout.num_rows))
        like = model.get_input_embeddings().weight
        self.table = PageTable(layout.num_rows, like.device)
        self.lengths = torch.zeros(layout.num_rows, dtype=torch.long, device=like.device)
        self._page_growing_stacks(like)
        self._allocate_bounded(model, like)

    def _page_growing_stacks(self, like: torch.Tensor) -> None:
        config, tokens = self.config, self.layout.page_tokens

        def paged(stack: StackCache, entries: int) -> PagedStack:
            stack = PagedStack(stack.layers, self.table, entries)
            stack.allocate(self.layout.num_pages, config.num_key_value_heads, config.head_dim, like)
            return stack

        self.encoders = [
            paged(stack, tokens // config.span(index + 1)) if stack.capacity is None else stack
            for index, stack in enumerate(self.encoders)
        ]
        self.full = paged(self.full, int(self.geometry.num_elements(torch.tensor(tokens))))
        self.memory = {level: paged(stack, tokens // config.span(level)) for level, stack in self.memory.items()}
        self._paged = [s for s in [*self.encoders, self.full, *self.memory.values()] if isinstance(s, PagedStack)]

    def _allocate_bounded(self, model: PhotonForCausalLM, like: torch.Tensor) -> None:
        config, rows = self.config, self.layout.num_rows
        bounded = [*self.encoders, *self.groups, self.window]
        self._bounded = [s for s in bounded if s is not None and not isinstance(s, PagedStack)]
        for stack in self._bounded:
            stack.allocate(rows, config.num_key_value_heads, config.head_dim, like)
        self.open = [like.new_zeros(rows, level["chunk_size"], config.hidden_size) for level in config.levels]
        self.slots = [None] * config.num_levels
        self._start = None
        if config.conditioning != "memory":
            self.slots = [like.new_zeros(rows, lv["num_slots"], config.hidden_size) for lv in config.levels]
            with torch.no_grad():
                self._start = model.model.levels[-1].converter(model.model.start(1).to(like.dtype))[0]

    # --- sequences ---

    @property
    def num_free_rows(self) -> int:
        return len(self._free_rows)

    def open_sequence(self) -> Held | None:
        """An empty sequence; None if no row is free."""
        if not self._free_rows:
            return None
        # The lowest row first: rows in use then lie together.
        held = Held(heapq.heappop(self._free_rows))
        row = torch.tensor([held.row], device=self.lengths.device)
        self.lengths[row] = 0
        for stack in [*self._bounded, *self._paged]:
            stack.clear(row)
        if self._start is not None:
            self.slots[-1][row] = self._start
        return held

    def reserve(self, held: Held, tokens: int) -> bool:
        """Make room for `tokens` tokens in all; False (and nothing changed) if there are too few free pages."""
        had = len(held.pages)
        pages = self.pool.take(max(0, self.layout.pages_for(tokens) - had))
        if pages is None:
            return False
        held.pages += pages
        if pages:
            self.table.set(held, had)
        return True

    def fork(self, held: Held, share: bool = True) -> Held | None:
        """A second sequence in the same state: full pages are shared, the bounded row and an open page are copied.

        Returns None (and nothing changed) if there is no row or page for it.

        Args:
            held: The first sequence.
            share: False copies full pages as well.
        """
        used = self.layout.pages_for(held.length)
        full = held.length // self.layout.page_tokens if share else 0
        if not self._free_rows or used - full > self.pool.num_free:
            return None
        copy = Held(heapq.heappop(self._free_rows), held.pages[:full], held.length)
        self.pool.share(copy.pages)
        copy.pages = copy.pages + self.pool.take(used - full)
        if used > full:
            old, new = (torch.tensor(one.pages[full:used], device=self.lengths.device) for one in (held, copy))
            for states in self._page_tensors():
                states[new] = states[old]
        for states in self._row_tensors():
            states[copy.row] = states[held.row]
        self.table.set(copy)
        return copy

    def close(self, held: Held) -> None:
        """Give back a sequence's row and its part in its pages."""
        self.pool.release(held.pages)
        heapq.heappush(self._free_rows, held.row)
        held.pages = []

    def swap_out(self, held: Held) -> Saved:
        """Copy a sequence's state to main memory, bit by bit, and close it."""
        used = self._used_pages(held)
        saved = Saved(
            [states[held.row].cpu().clone() for states in self._row_tensors()],
            [states[used].cpu() for states in self._page_tensors()],
            held.length,
        )
        self.close(held)
        return saved

    def swap_in(self, saved: Saved, tokens: int) -> Held | None:
        """The sequence again, with room for `tokens`; None (and nothing changed) if there is no row or page for it."""
        if not self._free_rows:
            return None
        held = Held(heapq.heappop(self._free_rows), [], saved.length)
        if not self.reserve(held, tokens):
            self.close(held)
            return None
        for states, row in zip(self._row_tensors(), saved.row, strict=True):
            states[held.row] = row.to(states.device)
        used = self._used_pages(held)
        for states, pages in zip(self._page_tensors(), saved.pages, strict=True):
            states[used] = pages.to(states.device)
        return held

    def _used_pages(self, held: Held) -> torch.Tensor:
        pages = held.pages[: self.layout.pages_for(held.length)]
        return torch.tensor(pages, dtype=torch.long, device=self.lengths.device)

    def begin(self, sequences: Iterable[Held]) -> None:
        """Announce the sequences of the next pass."""
        self.table.begin(sequences)

    def fix_shapes(self, max_pages: int) -> None:
        """Keep the shapes that passes see few: a page table of `max_pages` per row, and rounded numbers of pages.

        Rows may then be given twice.
        """
        self.table.widen(max_pages)
        self.table.rounded = True
        for stack in self._bounded:
            stack.all_in_order = False

    # --- bytes ---

    def kv_bytes(self) -> dict[str, int]:
        """Bytes allocated, as in `PhotonCache`: `growing` are the pages."""
        buffers = [*self.open, *[slots for slots in self.slots if slots is not None]]
        return {
            "growing": sum(stack.nbytes() for stack in self._paged),
            "constant": sum(stack.nbytes() for stack in self._bounded),
            "buffers": sum(t.numel() * t.element_size() for t in buffers),
        }

    def used_bytes(self, sequences: Iterable[Held]) -> int:
        """Bytes of the rows and pages that `sequences` hold; a shared page counts once."""
        sequences = list(sequences)
        pages = {page for held in sequences for page in held.pages}
        return len(sequences) * self.layout.row_bytes + len(pages) * self.layout.page_bytes

    def _row_tensors(self) -> list[torch.Tensor]:
        stacks = [t for s in self._bounded for t in (s.order, *s.keys.values(), *s.values.values())]
        slots = [slots for slots in self.slots if slots is not None]
        return [self.lengths, *self.open, *slots, *stacks, *[stack.counts for stack in self._paged]]

    def _page_tensors(self) -> list[torch.Tensor]:
        return [states for stack in self._paged for kv in (stack.keys, stack.values) for states in kv.values()]

    def select_nothing(self, *_: object) -> None:
        raise NotImplementedError("rows of a PagedCache are forked and closed, not selected: use fork and close")

    batch_select_indices = batch_repeat_interleave = reorder_cache = select_nothing
