"""`PagedCache`: a model's cache for many sequences that come and go.

What grows (latents of memory layers, full-attention layers, unbounded encoders) lies in blocks; what is bounded (rings,
buffers) in one fixed row per sequence. A row and a block have the bytes that `accounting` states.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from photon_train import accounting
from photon_train.errors import PhotonError
from photon_train.inference.blocks import Allocation, BlockPool, BlockStore, BlockTable, SwappedState
from photon_train.models.stores_photon import Part

BLOCK_SIZE = 256


@dataclass(frozen=True)
class CacheLayout:
    """Sizes of a `PagedCache`.

    Attributes:
        num_rows: Sequences (running ones and kept prefixes) that it holds at a time.
        num_blocks: Blocks of all of them.
        block_size: Tokens that a block covers, a multiple of the tokens under every unit.
        row_bytes, block_bytes: Bytes of one row and one block, from `accounting`.
    """

    num_rows: int
    num_blocks: int
    block_size: int
    row_bytes: int
    block_bytes: int

    @classmethod
    def fit(
        cls,
        model: PreTrainedModel,
        memory_bytes: int,
        num_rows: int,
        block_size: int | None = None,
        max_length: int | None = None,
    ) -> CacheLayout:
        """Rows first, then as many blocks as `memory_bytes` leaves, but no more than rows of `max_length` can use.

        Raises:
            PhotonError: if the memory does not hold the rows and one block, or `block_size` cuts a unit.
        """
        config, dtype_bytes = model.config, model.get_input_embeddings().weight.element_size()
        unit_tokens = math.lcm(*(store.unit_tokens for store in model.new_cache().growing() if store.layers))
        block_size = block_size or math.ceil(BLOCK_SIZE / unit_tokens) * unit_tokens
        if block_size % unit_tokens:
            raise PhotonError(f"block_size={block_size} is not a multiple of the {unit_tokens} tokens under a unit")
        empty = accounting.cache_bytes(config, 0, dtype_bytes)
        row_bytes = empty.constant
        block_bytes = round(accounting.growing_bytes_per_token(config, dtype_bytes) * block_size)
        most = num_rows * math.ceil((max_length or config.max_position_embeddings) / block_size)
        left = memory_bytes - num_rows * row_bytes
        num_blocks = min(most, left // block_bytes) if block_bytes else most
        if left < 0 or num_blocks < 1:
            need = num_rows * row_bytes + block_bytes
            raise PhotonError(
                f"memory={memory_bytes} does not hold {num_rows} sequences of {row_bytes} bytes and a block of "
                f"{block_bytes} bytes: give at least {need}, or lower max_sequences or max_prefixes"
            )
        return cls(num_rows, num_blocks, block_size, row_bytes, block_bytes)

    @property
    def total_bytes(self) -> int:
        """Bytes of keys, values and buffers."""
        return self.num_rows * self.row_bytes + self.num_blocks * self.block_bytes

    def blocks_for(self, tokens: int) -> int:
        """Blocks of a sequence of `tokens`."""
        return math.ceil(tokens / self.block_size)


class PagedCache:
    """A pool of rows and blocks; sequences are `Allocation` handles.

    Attributes:
        state: The model's own cache of `num_rows` rows, whose growing stores lie in blocks. `begin` chooses its rows
            for the next pass.
    """

    def __init__(self, model: PreTrainedModel, layout: CacheLayout) -> None:
        like = model.get_input_embeddings().weight
        self.layout, self.pool = layout, BlockPool(layout.num_blocks)
        self.table = BlockTable(layout.num_rows, like.device)
        self._free_rows = list(range(layout.num_rows))

        def store(formats: Mapping[int, Sequence[Part]], unit_tokens: int) -> BlockStore:
            return BlockStore(formats, unit_tokens, self.table, layout.num_blocks, layout.block_size)

        self.state = model.new_cache(growing=store)
        self.state.allocate(layout.num_rows, model.config.num_key_value_heads, model.config.head_dim, like)

    # --- sequences ---

    @property
    def num_free_rows(self) -> int:
        return len(self._free_rows)

    def open_sequence(self) -> Allocation | None:
        """An empty sequence; None if no row is free."""
        if not self._free_rows:
            return None
        # The lowest row first: rows in use then lie together.
        allocation = Allocation(heapq.heappop(self._free_rows))
        self.state.clear(allocation.row)
        return allocation

    def reserve(self, allocation: Allocation, tokens: int) -> bool:
        """Make room for `tokens` tokens in all; False (and nothing changed) if there are too few free blocks."""
        had = len(allocation.blocks)
        blocks = self.pool.take(max(0, self.layout.blocks_for(tokens) - had))
        if blocks is None:
            return False
        allocation.blocks += blocks
        if blocks:
            self.table.set(allocation, had)
            # What another sequence left there, were it not finite, would outlive its mask: 0 x NaN is NaN.
            for states in self._block_tensors():
                states[torch.tensor(blocks, device=states.device)] = 0
        return True

    def fork(self, allocation: Allocation, share: bool = True) -> Allocation | None:
        """A second sequence in the same state: full blocks are shared, the bounded row and an open block are copied.

        Returns None (and nothing changed) if there is no row or block for it.

        Args:
            allocation: The first sequence.
            share: False copies full blocks as well.
        """
        used = self.layout.blocks_for(allocation.length)
        full = allocation.length // self.layout.block_size if share else 0
        if not self._free_rows or used - full > self.pool.num_free:
            return None
        copy = Allocation(heapq.heappop(self._free_rows), allocation.blocks[:full], allocation.length)
        self.pool.share(copy.blocks)
        copy.blocks = copy.blocks + self.pool.take(used - full)
        if used > full:
            device = self.table.blocks.device
            old, new = (torch.tensor(one.blocks[full:used], device=device) for one in (allocation, copy))
            for states in self._block_tensors():
                states[new] = states[old]
        for states in self.state.row_tensors():
            states[copy.row] = states[allocation.row]
        self.table.set(copy)
        return copy

    def close(self, allocation: Allocation) -> None:
        """Give back a sequence's row and its references to its blocks."""
        self.pool.release(allocation.blocks)
        heapq.heappush(self._free_rows, allocation.row)
        allocation.blocks = []

    def keep_only(self, sequences: list[Allocation]) -> None:
        """Give back every row and block that none of `sequences` has: what an interrupted operation has left taken."""
        rows = {allocation.row for allocation in sequences}
        self._free_rows = [row for row in range(self.layout.num_rows) if row not in rows]
        self.pool.recount(allocation.blocks for allocation in sequences)

    def swap_out(self, allocation: Allocation) -> SwappedState:
        """Copy a sequence's state to main memory, bit by bit, and close it."""
        used = self._used_blocks(allocation)
        saved = SwappedState(
            [states[allocation.row].cpu().clone() for states in self.state.row_tensors()],
            [states[used].cpu() for states in self._block_tensors()],
            allocation.length,
        )
        self.close(allocation)
        return saved

    def swap_in(self, saved: SwappedState, tokens: int) -> Allocation | None:
        """The sequence again, with room for `tokens`; None (and nothing changed) if there is no room for it."""
        if not self._free_rows:
            return None
        allocation = Allocation(heapq.heappop(self._free_rows), [], saved.length)
        if not self.reserve(allocation, tokens):
            self.close(allocation)
            return None
        for states, row in zip(self.state.row_tensors(), saved.row, strict=True):
            states[allocation.row] = row.to(states.device)
        used = self._used_blocks(allocation)
        for states, blocks in zip(self._block_tensors(), saved.blocks, strict=True):
            states[used] = blocks.to(states.device)
        return allocation

    def _used_blocks(self, allocation: Allocation) -> torch.Tensor:
        blocks = allocation.blocks[: self.layout.blocks_for(allocation.length)]
        return torch.tensor(blocks, dtype=torch.long, device=self.table.blocks.device)

    def begin(self, sequences: list[Allocation]) -> None:
        """Choose the rows of the next pass, in this order."""
        self.table.begin(sequences)
        rows = [allocation.row for allocation in sequences]
        self.state.host_lengths = [allocation.length for allocation in sequences]
        # All rows, in order, are read as they lie; others are gathered.
        whole = rows == list(range(self.layout.num_rows)) and not self.table.rounded
        self.state.rows = None if whole else torch.tensor(rows, device=self.table.blocks.device)

    def fix_shapes(self, max_blocks: int) -> None:
        """Keep the shapes that passes see few: a table of `max_blocks` per row, and rounded numbers of blocks.

        Rows may then be given twice.
        """
        self.table.widen(max_blocks)
        self.table.rounded = True

    # --- bytes ---

    def allocated_bytes(self) -> int:
        """Bytes of keys, values and buffers (lengths and indices of slots left aside)."""
        stored = [*self.state.row_tensors(), *self._block_tensors()]
        return sum(states.numel() * states.element_size() for states in stored if states.dtype != torch.long)

    def used_bytes(self, sequences: Iterable[Allocation]) -> int:
        """Bytes of the rows and blocks that `sequences` have; a shared block counts once."""
        sequences = list(sequences)
        blocks = {block for allocation in sequences for block in allocation.blocks}
        return len(sequences) * self.layout.row_bytes + len(blocks) * self.layout.block_bytes

    def _block_tensors(self) -> list[torch.Tensor]:
        return [states for store in self.state.growing() for states in store.tensors()]
