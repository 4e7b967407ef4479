"""Blocks for what grows with a text: one block table for all stores, each keeping its own number of slots per block.

A block covers `block_size` tokens of one sequence. A store with one slot per S tokens keeps ``block_size / S`` of them.
Blocks are counted by reference, so that sequences with a common prefix share them; a block that is not full belongs to
one sequence alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from photon_train.models.stores_photon import GrowingStore, Part, SlotMapping


@dataclass(eq=False)
class Allocation:
    """What a sequence has of the cache.

    Attributes:
        row: Its row of everything bounded.
        blocks: Its blocks, in order.
        length: Tokens fed.
    """

    row: int
    blocks: list[int] = field(default_factory=list)
    length: int = 0


@dataclass(frozen=True)
class SwappedState:
    """A sequence's whole state outside the cache: bounded tensors, contents of blocks, and tokens fed."""

    row: list[torch.Tensor]
    blocks: list[torch.Tensor]
    length: int


class BlockPool:
    """Which blocks are free, and how many sequences refer to each of the others."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.references = [0] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self, count: int) -> list[int] | None:
        """`count` blocks with one reference each; None if there are not as many."""
        if count > len(self._free):
            return None
        blocks = [self._free.pop() for _ in range(count)]
        for block in blocks:
            self.references[block] = 1
        return blocks

    def share(self, blocks: Iterable[int]) -> None:
        """One more reference to each block."""
        for block in blocks:
            self.references[block] += 1

    def recount(self, held: Iterable[Iterable[int]]) -> None:
        """Count references anew: `held` are the blocks of every sequence there is."""
        self.references = [0] * self.num_blocks
        for blocks in held:
            self.share(blocks)
        self._free = [block for block in reversed(range(self.num_blocks)) if not self.references[block]]

    def release(self, blocks: Iterable[int]) -> None:
        """One reference less to each block; those without are free again."""
        for block in blocks:
            self.references[block] -= 1
            if self.references[block] == 0:
                self._free.append(block)


class BlockTable:
    """The blocks of every row on the device, ``[rows, width]``; the width grows with the longest sequence.

    Beyond a sequence's blocks its last one is repeated. Passes read as many of every row as the longest has and mask
    the rest: were that another sequence's block, what is not finite there would come through (0 x NaN is NaN).

    Attributes:
        bound: Blocks per row that the next pass reads.
        rounded: Whether `bound` takes few values only.
    """

    def __init__(self, num_rows: int, device: torch.device) -> None:
        self.blocks = torch.zeros(num_rows, 1, dtype=torch.long, device=device)
        self.bound, self.rounded = 0, False

    def set(self, allocation: Allocation, first: int = 0) -> None:
        """Take over the blocks of a sequence from the first-th on."""
        missing = len(allocation.blocks) - self.blocks.shape[1]
        if missing > 0:
            self.widen(self.blocks.shape[1] + max(missing, self.blocks.shape[1]))
        new = torch.tensor(allocation.blocks[first:], dtype=torch.long, device=self.blocks.device)
        self.blocks[allocation.row, first : len(allocation.blocks)] = new
        if allocation.blocks:
            self.blocks[allocation.row, len(allocation.blocks) :] = allocation.blocks[-1]

    def widen(self, width: int) -> None:
        """Make room for `width` blocks per row."""
        last = self.blocks[:, -1:].expand(-1, max(0, width - self.blocks.shape[1]))
        self.blocks = torch.cat([self.blocks, last], dim=1)

    def begin(self, allocations: Iterable[Allocation]) -> None:
        """Announce the sequences of the next pass: reads return as many blocks as the longest of them has."""
        self.bound = max(len(one.blocks) for one in allocations)
        if self.rounded:
            # Two leading bits: 1, 2, 3, 4, 6, 8, 12, ...; slots of blocks that a row does not have are masked.
            unit = 1 << max(0, self.bound.bit_length() - 2)
            self.bound = min(-(-self.bound // unit) * unit, self.blocks.shape[1])


class BlockStore(GrowingStore):
    """A `GrowingStore` in blocks, ``[blocks, heads, slots, size]``: element i of a row is in its i-th slot.

    On the torch path a read gathers the rows' blocks into one tensor (a copy of what grows, a few percent of a dense
    model's keys); kernels read the blocks in place.

    Attributes:
        per_block: Slots per block.
    """

    def __init__(
        self,
        formats: Mapping[int, Sequence[Part]],
        unit_tokens: int,
        table: BlockTable,
        num_blocks: int,
        block_size: int,
    ) -> None:
        super().__init__(formats, unit_tokens)
        self.table, self.num_blocks, self.per_block = table, num_blocks, block_size // unit_tokens

    def allocate(self, rows: int, like: torch.Tensor) -> None:
        self._make(self.num_blocks, self.per_block, like)

    def reserve(self, count: int | None) -> None:
        """Nothing: the scheduler has reserved the blocks."""

    def read(self, layer: int, rows: torch.Tensor | None, count: int | None) -> tuple[torch.Tensor, ...]:
        return tuple(self._gather(part, rows) for part in self.states[layer])

    def write(self, layer: int, slot_mapping: SlotMapping, *new: torch.Tensor) -> None:
        slots = slot_mapping.slots
        if slot_mapping.batch is None:
            rows = self._rows(slot_mapping.rows)
            where = self.table.blocks[rows[:, None], slots // self.per_block], (slots % self.per_block).expand(1, -1)
        else:
            where = self.table.blocks[slot_mapping.cache_rows, slots // self.per_block], slots % self.per_block
        for stored, states in zip(self.states[layer], new, strict=True):
            states = states.detach().transpose(1, 2).to(stored.dtype)
            states = (
                states[:, slot_mapping.columns]
                if slot_mapping.batch is None
                else states[slot_mapping.batch, slot_mapping.columns]
            )
            stored[where[0], :, where[1]] = states

    def operands(self, layer: int) -> tuple[torch.Tensor, ...]:
        return (*self.states[layer], self.table.blocks[:, : self.table.bound])

    def _rows(self, rows: torch.Tensor | None) -> torch.Tensor:
        blocks = self.table.blocks
        return torch.arange(blocks.shape[0], device=blocks.device) if rows is None else rows

    def _gather(self, states: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
        _, heads, slots, dim = states.shape
        blocks = self.table.blocks[self._rows(rows), : self.table.bound]
        # One index per block and head: the copy comes out in the order that attention wants.
        which = blocks[:, None, :] * heads + torch.arange(heads, device=blocks.device)[:, None]
        flat = states.view(-1, slots * dim).index_select(0, which.flatten())
        return flat.view(blocks.shape[0], heads, self.table.bound * slots, dim)
