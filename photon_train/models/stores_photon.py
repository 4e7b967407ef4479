"""Stores of keys, values and latents, rows first: bounded rings, and stores that grow with the text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .configuration_photon import PhotonConfig

KeyValue = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class SlotMapping:
    """Which new elements go into which slots.

    Attributes:
        rows: Rows of the cache, ``[n]``; None: row i of the pass is row i of the cache.
        columns: Elements of the pass, ``[m]``.
        slots: Their slots, ``[m]``.
        batch: Row of the pass of each element, ``[m]``; None: every row stores all columns.
        is_one_each: Whether they are the pass's rows in order, of one element each.
    """

    rows: torch.Tensor | None
    columns: torch.Tensor
    slots: torch.Tensor
    batch: torch.Tensor | None = None
    is_one_each: bool = False

    @property
    def cache_rows(self) -> torch.Tensor:
        """Row of the cache of each element, ``[m]``; with `batch` only."""
        if self.rows is None:
            return self.batch
        return self.rows if self.is_one_each else self.rows[self.batch]

    def take(self, new: torch.Tensor) -> torch.Tensor:
        """The elements of ``new [B, heads, T, size]``, ``[m, heads, 1, size]``; with `batch` only."""
        return new if self.is_one_each else new[self.batch, :, self.columns, None]

    def put(self, stored: torch.Tensor, new: torch.Tensor) -> None:
        """Store ``new [n, ..., T, (D)]`` in ``stored [rows, ..., N, (D)]``; slots are dimension 2, or 1 of two."""
        new = new.detach().to(stored.dtype)
        if stored.dim() == 2:
            stored, new = stored[:, None, :, None], new[:, None, :, None]
        if self.batch is not None:
            stored[self.cache_rows, :, self.slots] = new[self.batch, :, self.columns]
            return
        if len(self.columns) != new.shape[2]:
            new = new[:, :, self.columns]
        if self.rows is None:
            stored.index_copy_(2, self.slots, new)
        else:
            stored[self.rows[:, None], :, self.slots] = new.transpose(1, 2)


class RingStore:
    """Keys and values of windowed layers: a few sinks, then the latest elements, ``[rows, Hkv, sinks + ring, D]``.

    Attributes:
        layers: Layers that it holds.
        num_sinks: Elements 0 ... num_sinks - 1 keep a slot of their own.
        ring_size: Slots that later elements share in turn.
        index: Sequence index of the element in each slot, ``[rows, N]``, -1 where empty.
    """

    def __init__(self, layers: Iterable[int], num_sinks: int, ring_size: int) -> None:
        self.layers, self.num_sinks, self.ring_size = list(layers), num_sinks, ring_size
        self.index: torch.Tensor | None = None
        self.keys: dict[int, torch.Tensor] = {}
        self.values: dict[int, torch.Tensor] = {}

    @property
    def capacity(self) -> int:
        """Slots of a row."""
        return self.num_sinks + self.ring_size

    def allocate(self, rows: int, heads: int, head_dim: int, like: torch.Tensor) -> None:
        """Make `rows` empty rows with the type and device of `like`."""
        self.index = torch.full((rows, self.capacity), -1, device=like.device)
        for states in (self.keys, self.values):
            for layer in self.layers:
                states[layer] = like.new_zeros(rows, heads, self.capacity, head_dim)

    def slot(self, index: torch.Tensor) -> torch.Tensor:
        """Slot of an element."""
        return torch.where(index < self.num_sinks, index, self.num_sinks + index % self.ring_size)

    def read_index(self, rows: torch.Tensor | None) -> torch.Tensor:
        """Elements in the slots, ``[n, N]``, -1 where empty; a copy."""
        return self.index.clone() if rows is None else self.index[rows]

    def read(self, layer: int, rows: torch.Tensor | None) -> KeyValue:
        """Keys and values, ``[n, Hkv, N, D]``."""
        return tuple(states[layer] if rows is None else states[layer][rows] for states in (self.keys, self.values))

    def write(self, layer: int, slot_mapping: SlotMapping, key: torch.Tensor, value: torch.Tensor) -> None:
        """Store ``key, value [n, Hkv, T, D]``."""
        slot_mapping.put(self.keys[layer], key)
        slot_mapping.put(self.values[layer], value)

    def operands(self, layer: int) -> tuple[torch.Tensor, torch.Tensor, None]:
        """What a kernel reads in place: keys, values, and no block table."""
        return self.keys[layer], self.values[layer], None

    def forget(self, rows: torch.Tensor, lengths: torch.Tensor) -> None:
        """Empty the slots of `rows` whose elements are not among the first ``lengths [n]``."""
        index = self.index[rows]
        self.index[rows] = index.masked_fill(index >= lengths[:, None], -1)

    def tensors(self) -> list[torch.Tensor]:
        """Everything that belongs to rows, rows first."""
        return [] if self.index is None else [self.index, *self.keys.values(), *self.values.values()]

    def select(self, rows: torch.Tensor) -> None:
        """Keep `rows`, in that order."""
        if self.index is not None:
            self.index = self.index.index_select(0, rows)
            for states in (self.keys, self.values):
                states.update({layer: states[layer].index_select(0, rows) for layer in self.layers})

    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return sum(t.numel() * t.element_size() for t in (*self.keys.values(), *self.values.values()))


@dataclass(frozen=True)
class Part:
    """One tensor of a growing store: what it keeps of every element.

    Attributes:
        heads, size: It has ``[heads, size]`` numbers of an element.
        dtype: Their type; None: that of the model's states.
    """

    heads: int
    size: int
    dtype: torch.dtype | None = None

    def nbytes(self, dtype_bytes: int) -> int:
        """Bytes of an element, where those of a state are `dtype_bytes`."""
        return self.heads * self.size * (dtype_bytes if self.dtype is None else self.dtype.itemsize)


class GrowingStore:
    """What all elements of a row leave behind (keys and values, latents), in order, ``[rows, heads, capacity, size]``.

    Args:
        formats: By layer, the tensors that are kept of an element.
        unit_tokens: Tokens that one element stands for.

    Attributes:
        states: By layer, the tensors.
    """

    def __init__(self, formats: Mapping[int, Sequence[Part]], unit_tokens: int = 1) -> None:
        self.formats, self.unit_tokens = dict(formats), unit_tokens
        self.states: dict[int, list[torch.Tensor]] = {}

    @property
    def layers(self) -> list[int]:
        """Layers that it holds."""
        return list(self.formats)

    def allocate(self, rows: int, like: torch.Tensor) -> None:
        """Make `rows` empty rows; states have the type and all the device of `like`."""
        self._make(rows, 0, like)

    def _make(self, rows: int, slots: int, like: torch.Tensor) -> None:
        for layer, parts in self.formats.items():
            self.states[layer] = [
                torch.zeros(rows, part.heads, slots, part.size, dtype=part.dtype or like.dtype, device=like.device)
                for part in parts
            ]

    def reserve(self, count: int) -> None:
        """Make room for `count` elements of every row."""
        have = next((parts[0].shape[2] for parts in self.states.values()), count)
        if count > have:
            # A quarter more than needed: tokens that come one by one copy the store rarely.
            missing = count - have + count // 4
            for layer, parts in self.states.items():
                self.states[layer] = [torch.nn.functional.pad(part, (0, 0, 0, missing)) for part in parts]

    def read(self, layer: int, rows: torch.Tensor | None, count: int) -> tuple[torch.Tensor, ...]:
        """At least the first `count` elements (as many as there are), ``[n, heads, >= count, size]`` of each part."""
        parts = (part[:, :, :count] for part in self.states[layer])
        return tuple(part if rows is None else part[rows] for part in parts)

    def write(self, layer: int, slot_mapping: SlotMapping, *new: torch.Tensor) -> None:
        """Store ``new [n, heads, T, size]``, one for each part; a slot is an element's index."""
        for stored, states in zip(self.states[layer], new, strict=True):
            slot_mapping.put(stored, states)

    def operands(self, layer: int) -> tuple[torch.Tensor | None, ...]:
        """What a kernel reads in place: the parts, and the block table (None: row r lies in row r)."""
        return (*self.states[layer], None)

    def tensors(self) -> list[torch.Tensor]:
        """Everything stored, rows (or blocks) first."""
        return [part for parts in self.states.values() for part in parts]

    def select(self, rows: torch.Tensor) -> None:
        """Keep `rows`, in that order."""
        for layer, parts in self.states.items():
            self.states[layer] = [part.index_select(0, rows) for part in parts]

    def nbytes(self, counts: Iterable[int]) -> int:
        """Bytes of the first ``counts[b]`` elements of each row."""
        total = sum(counts)
        return sum(total * part.shape[1] * part.shape[3] * part.element_size() for part in self.tensors())


def key_value_parts(config: Any) -> tuple[Part, ...]:
    """A token's keys and values in a layer of any PHOTON model."""
    return (Part(config.num_key_value_heads, config.head_dim),) * 2


def latent_parts(config: PhotonConfig, heads: int) -> tuple[Part, ...]:
    """A unit's latents of so many key-value heads: its halves, or their codes and then their scales."""
    if config.memory_bits == 16:
        return (Part(heads, config.head_dim),) * 2
    codes, scales = Part(heads, config.head_dim * config.memory_bits // 8, torch.uint8), Part(heads, 1, torch.bfloat16)
    return codes, codes, scales, scales
