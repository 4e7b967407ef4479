"""vLLM's blocks as the stores that our segments read and write (`photon_train.models.stores_photon`).

A block of a layer's cache is ``[tokens, heads, C]`` in memory (layout BLNHC), C one token's key and value of a head, or
one unit's latent. New keys and values are written for a whole step at once (`write_tokens`), before anything is read: a
request may have found another one's blocks in vLLM's prefix cache that are computed in the same step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch

from photon_train.models.attention_photon import NewElements
from photon_train.models.configuration_photon import PhotonConfig
from photon_train.models.stores_photon import KeyValue, SlotMapping, latent_parts

# The block that vLLM never gives to a request and nothing writes to.
NULL_BLOCK = 0

# By layer, its cache as vLLM binds it, ``[blocks, heads, slots, C]``.
Caches = Mapping[int, torch.Tensor]
# By layer, the block table of its group for some requests, ``[n, width]``.
BlockTables = Callable[[int], torch.Tensor]


def write_tokens(cache: torch.Tensor, slots: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
    """Store ``key, value [tokens, Hkv, D]`` at ``slots [tokens]`` of ``cache [blocks, Hkv, block size, 2 D]``."""
    size = cache.shape[2]
    cache[slots // size, :, slots % size] = torch.cat([key, value], dim=-1).to(cache.dtype)


# By place, memory that is read into again and again: fresh memory costs a page fault every few kilobytes.
_buffers: dict[tuple, torch.Tensor] = {}


def select(source: torch.Tensor, index: torch.Tensor, place: str) -> torch.Tensor:
    """``source [rows, ...]`` at ``index [k]``, valid until the next call with this `place`."""
    shape, name = (len(index), *source.shape[1:]), (place, source.dtype, source.device)
    size = math.prod(shape)
    if name not in _buffers or _buffers[name].numel() < size:
        _buffers[name] = torch.empty(size, dtype=source.dtype, device=source.device)
    return torch.index_select(source, 0, index, out=_buffers[name][:size].view(shape))


def read_blocks(cache: torch.Tensor, blocks: torch.Tensor, place: str) -> torch.Tensor:
    """``cache [B, H, N, C]`` at ``blocks [n, k]``, as ``[n, k * N, H, C]``, until the next call with this `place`."""
    found = select(cache.permute(0, 2, 1, 3), blocks.flatten(), place)
    return found.view(blocks.shape[0], -1, *found.shape[2:])


class PagedTokens:
    """Keys and values of some requests in the blocks of a kind of layers: a window with sinks, or everything.

    Args:
        caches: Of the layers.
        tables: Their block tables.
        first: First token of each request that is read beside the sinks, ``[n]`` on the host.
        stop: Tokens of each request that are read, ``[n]`` on the host.
        num_sinks: First tokens that are read too.
        stored: Tokens of each request that its blocks hold once the step's are written, ``[n]`` on the host.
    """

    def __init__(
        self, caches: Caches, tables: BlockTables, first: list[int], stop: list[int], num_sinks: int, stored: list[int]
    ) -> None:
        self.caches, self.tables, self.num_sinks = caches, tables, num_sinks
        self.layers = list(caches)
        some = next(iter(caches.values()))
        self.block_size, device = some.shape[2], some.device
        size = self.block_size
        self._low = [max(begin, 0) // size for begin in first]
        # Columns that all requests have: sinks' blocks, then as many as the widest window covers.
        columns = max(-(-end // size) - low for low, end in zip(self._low, stop, strict=True))
        self._sink_columns = -(-num_sinks // size)
        block = torch.tensor(self._low, device=device)[:, None] + torch.arange(columns, device=device)
        begin, end = (torch.tensor(each, device=device)[:, None] for each in (first, stop))
        token = (block[:, :, None] * size + torch.arange(size, device=device)).flatten(1)
        index = token.masked_fill((token < begin) | (token >= end) | (token < num_sinks), -1)
        sinks = torch.arange(self._sink_columns * size, device=device).expand(len(first), -1)
        sink_index = sinks.masked_fill((sinks >= end) | (sinks >= num_sinks), -1)
        self.index = torch.cat([sink_index, index], dim=1)
        # What earlier requests have left in a last block, were it not finite, would outlive its mask (0 x NaN is NaN):
        # the request's own last token stands in for it.
        self._token = torch.cat([sinks, token], dim=1).clamp(max=torch.tensor(stored, device=device)[:, None] - 1)
        self._rows: dict[int, torch.Tensor] = {}

    @property
    def capacity(self) -> int:
        """Slots of a request."""
        return self.index.shape[1]

    def slot(self, tokens: torch.Tensor) -> torch.Tensor:
        """Where `read` has tokens ``[1, E]`` of a single request that are no sinks."""
        return self._sink_columns * self.block_size + tokens - self._low[0] * self.block_size

    def read_index(self, rows: None) -> torch.Tensor:
        """Tokens in the slots, ``[n, N]``, -1 where none is read."""
        return self.index

    def read(self, layer: int, rows: None = None, count: int | None = None) -> KeyValue:
        """Keys and values, ``[n, Hkv, N, D]``, until another layer's are read."""
        cache, table = self.caches[layer], self.tables(layer)
        blocks, heads, size, width = cache.shape
        # Blocks of other layers lie between those of this one, not always a multiple of a key's width apart.
        piece = math.gcd(width // 2, *cache.stride()[:3])
        by_block, by_head, by_token = (stride // piece for stride in cache.stride()[:3])
        if id(table) not in self._rows:
            token = table.gather(1, self._token // size) * by_block + self._token % size * by_token
            head = torch.arange(heads, device=table.device)[:, None, None] * by_head
            parts = torch.arange(width // piece, device=table.device).view(2, 1, 1, 1, -1)
            self._rows[id(table)] = (token[:, None, :, None] + head + parts).flatten()
        count = (blocks - 1) * by_block + (heads - 1) * by_head + (size - 1) * by_token + width // piece
        # Keys and values apart, head by head: so products read them without a copy.
        found = select(cache.as_strided((count, piece), (piece, 1)), self._rows[id(table)], "tokens")
        return tuple(found.view(2, len(table), heads, -1, width // 2))

    def operands(self, layer: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What a kernel reads in place: keys and values ``[blocks, Hkv, block size, D]``, and the block table."""
        keys, values = self.caches[layer].chunk(2, dim=-1)
        return keys, values, self.tables(layer)

    def write(self, layer: int, slot_mapping: None, key: torch.Tensor, value: torch.Tensor) -> None:
        """The step's tokens have been written (`write_tokens`)."""

    def take(self, layer: int, rows: torch.Tensor, tokens: torch.Tensor) -> KeyValue:
        """Keys and values of ``tokens [n, E]`` of some of the requests, ``[n, Hkv, E, D]``."""
        block = self.tables(layer)[rows[:, None], tokens // self.block_size]
        found = self.caches[layer].permute(0, 2, 1, 3)[block, tokens % self.block_size]
        keys, values = found.transpose(1, 2).chunk(2, dim=-1)
        return keys, values


class PagedPrefix(PagedTokens):
    """All tokens of some requests, in the order that full attention reads them."""

    def __init__(self, caches: Caches, tables: BlockTables, stored: list[int]) -> None:
        super().__init__(caches, tables, [0] * len(stored), stored, 0, stored)

    def reserve(self, count: int) -> None:
        """vLLM has made room."""

    def read(self, layer: int, rows: None, count: int) -> KeyValue:
        """Keys and values, ``[n, Hkv, count, D]``."""
        return tuple(states[:, :, :count] for states in super().read(layer))


class PagedUnits:
    """Latents of some requests' units in vLLM's blocks; a state of a block is a unit of one key-value head.

    A cell's bytes are its parts (`latent_parts`) one after the other: keys' and values' halves, or codes and scales.

    Args:
        config: The model's.
        caches: Of the memory layers, ``[blocks, m, units, C]``.
        tables: Their block tables.
        counts: Units of each request once the step's are packed, ``[n]`` on the host.
    """

    unit_tokens = 1  # elements are units

    def __init__(self, config: PhotonConfig, caches: Caches, tables: BlockTables, counts: list[int]) -> None:
        self.config, self.caches, self.tables, self.counts = config, caches, tables, counts
        self.layers = list(caches)
        some = next(iter(caches.values()))
        self.block_units = some.shape[2]
        device = some.device
        columns = max(1, math.ceil(max(counts) / self.block_units))
        have = torch.tensor(counts, device=device)[:, None]
        self._block = torch.arange(columns, device=device).expand(len(counts), -1)
        self._block_is_used = self._block * self.block_units < have
        stale = torch.arange(columns * self.block_units, device=device) >= have
        self._stale = stale.nonzero(as_tuple=True)

    def reserve(self, count: int) -> None:
        """vLLM has made room."""

    def parts(self, layer: int) -> list[torch.Tensor]:
        """The parts of a layer's cells, ``[blocks, m, units, size]`` each; views."""
        cache, begin, found = self.caches[layer], 0, []
        for part in latent_parts(self.config, cache.shape[1]):
            dtype = part.dtype or cache.dtype
            size = part.size * dtype.itemsize // cache.element_size()
            found.append(cache[..., begin : begin + size].view(dtype))
            begin += size
        return found

    def read(self, layer: int, rows: None, count: int | None) -> tuple[torch.Tensor, ...]:
        """The first units, ``[n, m, >= count, size]`` of each part."""
        blocks = self.tables(layer).gather(1, self._block).masked_fill(~self._block_is_used, NULL_BLOCK)
        found = []
        for index, part in enumerate(self.parts(layer)):
            found.append(read_blocks(part, blocks, f"units {index}"))
            if part.is_floating_point():  # codes of any bits are finite
                found[-1][self._stale] = 0
        return tuple(states.transpose(1, 2) for states in found)

    def operands(self, layer: int) -> tuple[torch.Tensor, ...]:
        """What a kernel reads in place: the parts, and the block table."""
        return (*self.parts(layer), self.tables(layer))

    def write(self, layer: int, slot_mapping: SlotMapping, *new: torch.Tensor) -> None:
        """Store ``new [n, m, T, size]``, one for each part; a slot is a unit's index in its request."""
        table, device = self.tables(layer), slot_mapping.slots.device
        slots, columns, batch = slot_mapping.slots, slot_mapping.columns, slot_mapping.batch
        if batch is None:  # every request stores all columns
            rows = torch.arange(len(table), device=device).repeat_interleave(len(columns))
            slots, columns, batch = slots.repeat(len(table)), columns.repeat(len(table)), rows
        rows = batch if slot_mapping.rows is None else slot_mapping.cache_rows
        block = table[rows, slots // self.block_units].long()
        for part, states in zip(self.parts(layer), new, strict=True):
            part[block, :, slots % self.block_units] = states[batch, :, columns].to(part.dtype)


class PagedElements(NewElements):
    """The new tokens of some requests of a step, which have been written to their blocks already."""

    def enter(self, ring: PagedTokens) -> tuple[torch.Tensor, None]:
        index = ring.read_index(None)
        return index[:1] if self.index.shape[0] == 1 else index, None

    def append(self, store, layer: int, slot_mapping: SlotMapping | None, *new: torch.Tensor) -> None:
        if isinstance(store, PagedUnits):
            store.write(layer, slot_mapping, *new)
