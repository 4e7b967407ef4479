"""Keys and values of earlier tokens: bounded rings, growing stores, and `PhotonCache`, which holds those of a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache

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
    """

    rows: torch.Tensor | None
    columns: torch.Tensor
    slots: torch.Tensor
    batch: torch.Tensor | None = None

    @property
    def cache_rows(self) -> torch.Tensor:
        """Row of the cache of each element, ``[m]``; with `batch` only."""
        return self.batch if self.rows is None else self.rows[self.batch]

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


class RowCache(Cache):
    """What the caches of all PHOTON models share: rows with a length each, and the interface of transformers' caches.

    Attributes:
        lengths: Tokens that each row holds, ``[rows]``; None while nothing is allocated.
        host_lengths: The same for the rows of the next pass, on the host; None asks `lengths`.
        rows: Rows of the next pass, ``[n]``; None: all, in order.
        is_static: Whether the next pass may not depend on what the host knows of lengths (`host_lengths` is not used).
        columns: Input columns seen, padding included (what transformers calls the sequence length).
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.lengths: torch.Tensor | None = None
        self.host_lengths: list[int] | None = None
        self.rows: torch.Tensor | None = None
        self.is_static = False
        self.columns = 0

    def rings(self) -> list[RingStore]:
        """The bounded stores."""
        raise NotImplementedError

    def growing(self) -> list[GrowingStore]:
        """The stores that grow with the text."""
        raise NotImplementedError

    def allocate(self, rows: int, heads: int, head_dim: int, like: torch.Tensor) -> None:
        """Make `rows` empty rows."""
        self.lengths = torch.zeros(rows, dtype=torch.long, device=like.device)
        if self.host_lengths is None:
            self.host_lengths = [0] * rows
        for ring in self.rings():
            ring.allocate(rows, heads, head_dim, like)
        for store in self.growing():
            store.allocate(rows, like)

    def row_tensors(self) -> list[torch.Tensor]:
        """Everything bounded that belongs to rows, rows first."""
        return [self.lengths, *(tensor for ring in self.rings() for tensor in ring.tensors())]

    def clear(self, row: int) -> None:
        """Empty a row; nothing of what it held is left (masked, a NaN would still reach results)."""
        for tensor in self.row_tensors():
            tensor[row] = 0
        for ring in self.rings():
            ring.index[row] = -1

    def past_lengths(self) -> tuple[torch.Tensor, list[int] | None]:
        """Tokens of each row of the next pass, ``[n]``, on the device and on the host (None: `is_static`)."""
        lengths = self.lengths if self.rows is None else self.lengths[self.rows]
        if self.is_static:
            return lengths, None
        if self.host_lengths is None:
            self.host_lengths = lengths.tolist()
        return lengths, self.host_lengths

    def advance(self, columns: int, new: torch.Tensor | int, host_new: list[int] | None) -> None:
        """After a pass of `columns` columns, in which each row got ``new [n]`` tokens."""
        self.columns += columns
        if self.rows is None:
            self.lengths = self.lengths + new
        else:
            self.lengths[self.rows] = self.lengths[self.rows] + new
        if self.host_lengths is not None and host_new is not None:
            self.host_lengths = [had + more for had, more in zip(self.host_lengths, host_new, strict=True)]

    # --- what transformers asks of a cache ---

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any):
        """The states as they are: PHOTON's attention reads and writes the cache itself."""
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Input columns seen, padding included."""
        return self.columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """No bound: -1."""
        return -1

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_initialized(self) -> bool:
        return self.lengths is not None

    @property
    def is_sliding(self) -> list[bool]:
        return [False]

    @property
    def batch_size(self) -> int:
        return 0 if self.lengths is None else self.lengths.shape[0]

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows `indices`, in that order (repeats allowed)."""
        if self.lengths is None:
            return
        indices = indices.to(self.lengths.device)
        self.lengths = self.lengths.index_select(0, indices)
        if self.host_lengths is not None:
            self.host_lengths = [self.host_lengths[index] for index in indices.tolist()]
        for store in (*self.rings(), *self.growing()):
            store.select(indices)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Beam search: row i goes on from row ``beam_idx[i]``."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        if self.lengths is not None:
            rows = torch.arange(self.batch_size, device=self.lengths.device)
            self.batch_select_indices(rows.repeat_interleave(repeats))


def key_value_parts(config: Any) -> tuple[Part, ...]:
    """A token's keys and values in a layer of any PHOTON model."""
    return (Part(config.num_key_value_heads, config.head_dim),) * 2


def latent_parts(config: PhotonConfig, heads: int) -> tuple[Part, ...]:
    """A unit's latents of so many key-value heads: its halves, or their codes and then their scales."""
    if config.memory_bits == 16:
        return (Part(heads, config.head_dim),) * 2
    codes, scales = Part(heads, config.head_dim * config.memory_bits // 8, torch.uint8), Part(heads, 1, torch.bfloat16)
    return codes, codes, scales, scales


class PhotonCache(RowCache):
    """Cache of `PhotonForCausalLM`.

    Grows with the text: memory layers (one latent per unit that has left the window) and full-attention layers (one key
    and value per token). Everything else is constant. `accounting` has the formula.

    Args:
        config: The model's.
        rollback: Latest tokens that `crop` can take back at any length; windowed layers keep so many more.
        growing: Makes the stores that grow, ``growing(formats, unit_tokens)``.

    Attributes:
        window: Windowed layers; `local`: layers with the family's own window; `full`: full attention; `units`: latents
            of memory layers.
    """

    def __init__(
        self, config: PhotonConfig, rollback: int = 0, growing: Callable[..., GrowingStore] = GrowingStore
    ) -> None:
        super().__init__()
        self.config, self.rollback, self._make_growing = config, rollback, growing
        windowed, local, full = [], {}, []
        for layer in range(config.num_hidden_layers):
            own = config.family_window(layer)
            if config.has_window(layer):
                windowed.append(layer)
            elif own is not None:
                local.setdefault(own, []).append(layer)
            else:
                full.append(layer)
        self.window = RingStore(windowed, config.num_sinks, config.ring_size + rollback)
        self.local = {own: RingStore(layers, 0, own + rollback) for own, layers in local.items()}
        self.full = growing(dict.fromkeys(full, key_value_parts(config)), 1)
        self.units = growing(
            {layer: latent_parts(config, len(heads)) for layer, heads in config.memory_cells.items()}, config.chunk_size
        )

    def rings(self) -> list[RingStore]:
        return [self.window, *self.local.values()]

    def growing(self) -> list[GrowingStore]:
        return [self.full, self.units]

    def __len__(self) -> int:
        return self.config.num_hidden_layers

    def reset(self) -> None:
        """Forget everything."""
        self.__init__(self.config, self.rollback, self._make_growing)

    def kv_bytes(self) -> dict[str, int]:
        """Bytes of the whole batch's keys and values: `growing` and `constant`."""
        lengths = [] if self.lengths is None else self.lengths.tolist()
        units = [self.config.num_units(length) for length in lengths]
        return {
            "growing": self.full.nbytes(lengths) + self.units.nbytes(units),
            "constant": sum(ring.nbytes() for ring in self.rings()),
        }

    def crop(self, tokens_to_remove: int) -> None:
        """Take the latest tokens of every row back, given as a negative number (as in transformers' caches).

        Raises:
            ValueError: for a positive number, more tokens than a row has, and where windowed layers have overwritten
                what the shorter sequence sees. A cache made with `rollback` takes that many back at any length.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): give the tokens to take back as a negative number")
        removed = -tokens_to_remove
        if not removed or self.lengths is None:
            return
        lengths, rows = self.lengths.tolist(), torch.arange(self.batch_size, device=self.lengths.device)
        for length in lengths:
            left = length - removed
            if left < 0:
                raise ValueError(f"crop({tokens_to_remove}) takes {removed} tokens back; a row has {length}")
            needed = max(0, self.config.window_start(left - 1))
            for ring in self.rings():
                if ring.layers and length - ring.ring_size > needed:
                    raise ValueError(
                        f"the window of a row of {length} tokens cannot take {removed} of them back: use "
                        f"PhotonCache(config, rollback={removed}), or generate without an assistant"
                    )
        self.lengths = self.lengths - removed
        self.host_lengths = self.lengths.tolist()
        self.columns -= removed
        for ring in self.rings():
            ring.forget(rows, self.lengths)
