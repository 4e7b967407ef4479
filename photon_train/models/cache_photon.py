"""`PhotonCache`: what incremental decoding keeps per row: rings for what is bounded, one growing stream per summary."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from transformers.cache_utils import Cache

from .attention_photon import KeyValue, window_start
from .configuration_photon import PhotonConfig


@dataclass(frozen=True)
class StreamGeometry:
    """Where the elements (slots and tokens) of the token stream lie: in its sequence and in its ring.

    An *element* is a position of the decoder's sequence: with slots, chunk h holds elements
    ``h * (R + C) ... h * (R + C) + R + C - 1``, slots first; without, elements are tokens.
    """

    window: int
    alignment: int
    num_sinks: int
    chunk_size: int
    num_slots: int

    @classmethod
    def of(cls, config: PhotonConfig) -> StreamGeometry:
        slots = config.levels[0]["num_slots"] if config.uses_slots else 0
        chunk = config.levels[0]["chunk_size"] if slots else 1
        return cls(config.window, config.window_alignment, config.num_sinks, chunk, slots)

    @property
    def ring_size(self) -> int:
        """Entries of the ring: the longest window (after alignment) and the slots inside it."""
        longest = self.window + self.alignment - 1
        return longest + self.num_slots * math.ceil(longest / self.chunk_size)

    @property
    def capacity(self) -> int:
        """Entries per row and layer: sinks first, then the ring."""
        return self.num_sinks + self.ring_size

    def element_of_token(self, position: torch.Tensor) -> torch.Tensor:
        """Sequence index of the token at `position`."""
        chunk = position // self.chunk_size
        return chunk * (self.num_slots + self.chunk_size) + self.num_slots + position % self.chunk_size

    def num_elements(self, length: torch.Tensor) -> torch.Tensor:
        """Elements fed once `length` tokens have been: a chunk's slots come with its first token."""
        return length + self.num_slots * ((length + self.chunk_size - 1) // self.chunk_size)

    def is_sink(self, element: torch.Tensor) -> torch.Tensor:
        """Whether an element is one of the first `num_sinks` tokens."""
        period = self.num_slots + self.chunk_size
        inside = element % period - self.num_slots
        return (inside >= 0) & (element // period * self.chunk_size + inside < self.num_sinks)

    def entry(self, element: torch.Tensor) -> torch.Tensor:
        """Index in the cache of an element."""
        period = self.num_slots + self.chunk_size
        token = element // period * self.chunk_size + element % period - self.num_slots
        return torch.where(self.is_sink(element), token, self.num_sinks + element % self.ring_size)

    def first_visible(self, position: torch.Tensor) -> torch.Tensor:
        """Sequence index of the oldest element that a query at token `position` sees (sinks aside)."""
        start = window_start(position, self.window, self.alignment)
        # A chunk's slots stand at its first token: they are visible only if that token is.
        first_of_chunk = self.num_slots * (start % self.chunk_size == 0)
        return self.element_of_token(start) - first_of_chunk

    def held(self, length: torch.Tensor) -> torch.Tensor:
        """Elements in a row's cache after `length` tokens, by entry: ``[B, capacity]``, -1 where empty."""
        entries = torch.arange(self.ring_size, device=length.device)
        last = (self.num_elements(length) - 1)[:, None]
        element = last - (last - entries) % self.ring_size
        element = torch.where(self.is_sink(element.clamp(min=0)), -1, element).clamp(min=-1)
        token = torch.arange(self.num_sinks, device=length.device)
        sinks = torch.where(token < length[:, None], self.element_of_token(token), -1)
        return torch.cat([sinks, element], dim=1)


class StackCache:
    """Keys and values of some layers of one stack, ``[B, Hkv, N, D]`` each, with one shared table of elements.

    Attributes:
        order: Sequence index of the element in each entry, ``[B, N]``, -1 where empty.
        capacity: Entries per row; None grows by what is written.
        all_in_order: Whether as many rows as there are are all of them, ascending: they are then read as they lie.
    """

    def __init__(self, layers: Iterable[int], capacity: int | None) -> None:
        self.layers = list(layers)
        self.capacity = capacity
        self.order: torch.Tensor | None = None
        self.all_in_order = True
        self.keys: dict[int, torch.Tensor] = {}
        self.values: dict[int, torch.Tensor] = {}

    def allocate(self, batch: int, heads: int, head_dim: int, like: torch.Tensor) -> None:
        """Make `batch` empty rows of a bounded stack, with the type and device of `like`."""
        self.order = torch.full((batch, self.capacity), -1, device=like.device)
        for states in (self.keys, self.values):
            for layer in self.layers:
                states[layer] = like.new_zeros(batch, heads, self.capacity, head_dim)

    @property
    def size(self) -> int:
        """Entries per row that `read` returns."""
        return self.order.shape[1]

    def held(self, rows: torch.Tensor) -> torch.Tensor:
        """The elements in the entries of `rows` (ascending), ``[n, N]``, -1 where empty."""
        return self._of(self.order, rows)

    def read(self, layer: int, rows: torch.Tensor) -> KeyValue:
        """Keys and values of `rows` (ascending), ``[n, Hkv, N, D]`` each."""
        return self._of(self.keys[layer], rows), self._of(self.values[layer], rows)

    def operands(self, layer: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """What a kernel reads in place: keys, values, and the table of their pages (None: row r lies in row r)."""
        return self.keys[layer], self.values[layer], None

    def _of(self, states: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return states if self.all_in_order and rows.numel() == states.shape[0] else states[rows]

    def fill(self, recorded: dict[int, KeyValue], order: torch.Tensor, source: torch.Tensor | None = None) -> None:
        """Take over the keys and values of a whole-sequence pass.

        Args:
            recorded: Per layer, keys and values ``[B, Hkv, E, D]``.
            order: The elements that each entry holds, ``[B, N]``, -1 where empty.
            source: Position in `recorded` of each entry, ``[B, N]``; default: `order` itself.
        """
        self.order = order
        index = (order if source is None else source).clamp(min=0)[:, None, :, None]
        for layer in self.layers:
            key, value = recorded[layer]
            where = index.expand(-1, key.shape[1], -1, key.shape[3])
            self.keys[layer] = key.detach().gather(2, where)
            self.values[layer] = value.detach().gather(2, where)

    def place(self, rows: torch.Tensor, entries: torch.Tensor, order: torch.Tensor) -> None:
        """Announce new elements ``order [n, q]`` at ``entries [n, q]`` of ``rows [n]``; grow if need be."""
        if self.capacity is None:  # a bounded stack has room; asking would make a GPU wait
            self._grow(int(entries.max()) + 1 - self.order.shape[1])
        self.order[rows[:, None], entries] = order

    def _grow(self, missing: int) -> None:
        if missing <= 0:
            return
        self.order = torch.nn.functional.pad(self.order, (0, missing), value=-1)
        for states in (self.keys, self.values):
            for layer in self.layers:
                states[layer] = torch.nn.functional.pad(states[layer], (0, 0, 0, missing))

    def write(self, layer: int, rows: torch.Tensor, entries: torch.Tensor, key: torch.Tensor, value: torch.Tensor):
        """Store ``key, value [n, Hkv, q, D]`` at the announced entries."""
        self.keys[layer][rows[:, None], :, entries] = key.detach().transpose(1, 2).to(self.keys[layer].dtype)
        self.values[layer][rows[:, None], :, entries] = value.detach().transpose(1, 2).to(self.values[layer].dtype)

    def assign(self, rows: torch.Tensor, other: StackCache) -> None:
        """Let `rows` hold what the rows of `other` hold."""
        self.order[rows] = other.order
        for mine, others in ((self.keys, other.keys), (self.values, other.values)):
            for layer in self.layers:
                mine[layer][rows] = others[layer].to(mine[layer].dtype)

    def clear(self, rows: torch.Tensor) -> None:
        """Empty `rows`."""
        self.order.index_fill_(0, rows, -1)

    def select(self, rows: torch.Tensor) -> None:
        """Keep `rows`, in that order."""
        self.order = self.order.index_select(0, rows)
        for states in (self.keys, self.values):
            for layer in self.layers:
                states[layer] = states[layer].index_select(0, rows)

    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return sum(t.numel() * t.element_size() for kv in (self.keys, self.values) for t in kv.values())


class PhotonCache(Cache):
    """State of incremental decoding; every row keeps its own length and chunk phase.

    Grows with the context: unbounded encoders (one entry per unit), memory sources (one per unit), full-attention
    layers (one per token). Everything else is constant. `accounting` has the formula.

    Attributes:
        lengths: Tokens that each row holds, ``[B]``.
        columns: Input columns seen, padding included (what transformers calls the sequence length).
        encoders: Per level, the encoder's cache.
        groups: Per level, the cache of an isolated decoder over the open group, or None.
        window, full, memory: The token stream: windowed layers, full-attention layers, units by level.
        open: Per level, the states of the open chunk, ``[B, C, d]``.
        slots: Per level, the slots in force, ``[B, R, d]``, or None with `memory`.
        reconstructions: With `recgen`, per level below the top: what the decoder above makes of the open unit,
            ``[B, d]``.

    Args:
        protocol: Generation protocol, `hiergen` or `recgen`; see `PhotonForCausalLM.set_protocol`.
    """

    def __init__(self, config: PhotonConfig, protocol: str = "hiergen") -> None:
        super().__init__(layers=[])
        self.config, self.protocol = config, protocol
        self.geometry = StreamGeometry.of(config)
        self.lengths: torch.Tensor | None = None
        self.columns = 0
        self.open: list[torch.Tensor] = []
        self.slots: list[torch.Tensor | None] = []
        self.reconstructions: list[torch.Tensor] = []
        self.encoders = [StackCache(range(lv["encoder_layers"]), lv["encoder_window"]) for lv in config.levels]
        self.groups: list[StackCache | None] = []
        for index, level in enumerate(config.levels):
            isolated = level["decoder_layers"] > 0 and (index > 0 or config.layout == "block")
            capacity = level["num_slots"] + level["chunk_size"] - 1
            self.groups.append(StackCache(range(level["decoder_layers"]), capacity) if isolated else None)
        stream = range(config.num_token_layers) if config.layout == "stream" else []
        bounded = [layer for layer in stream if layer not in config.full_attention_layers]
        self.window = StackCache(bounded, self.geometry.capacity)
        self.full = StackCache([layer for layer in stream if layer in config.full_attention_layers], None)
        self.memory = {
            level: StackCache([source for source, at in config.source_levels.items() if at == level], None)
            for level in sorted(set(config.memory_levels))
        }

    def _stacks(self) -> list[StackCache]:
        stacks = [*self.encoders, *[g for g in self.groups if g is not None], self.window, self.full]
        return [stack for stack in [*stacks, *self.memory.values()] if stack.order is not None]

    @property
    def is_empty(self) -> bool:
        """Whether nothing has been written."""
        return self.lengths is None

    def kv_bytes(self) -> dict[str, int]:
        """Bytes of the whole batch: keys and values `growing` and `constant`; `buffers`: open chunks, slots and
        reconstructions."""
        growing = [*self.memory.values(), self.full, *[e for e in self.encoders if e.capacity is None]]
        total = sum(stack.nbytes() for stack in self._stacks())
        grown = sum(stack.nbytes() for stack in growing)
        buffers = [*self.open, *[slots for slots in self.slots if slots is not None], *self.reconstructions]
        return {
            "growing": grown,
            "constant": total - grown,
            "buffers": sum(t.numel() * t.element_size() for t in buffers),
        }

    # --- what transformers' generation asks of a cache ---

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Input columns seen, padding included."""
        return self.columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """No bound: -1."""
        return -1

    def __len__(self) -> int:
        return self.config.num_layers

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_initialized(self) -> bool:
        return not self.is_empty

    @property
    def is_sliding(self) -> list[bool]:
        return [False]

    @property
    def batch_size(self) -> int:
        return 0 if self.lengths is None else self.lengths.shape[0]

    def reset(self) -> None:
        """Forget everything."""
        self.__init__(self.config, self.protocol)

    def crop(self, max_length: int) -> None:
        """Not possible: summaries of completed chunks cannot be taken apart.

        Raises:
            NotImplementedError: always; decode without assistant or prompt lookup.
        """
        raise NotImplementedError(
            "PhotonCache cannot be cropped: summaries of completed chunks cannot be taken apart. "
            "Generate without an assistant model or prompt lookup."
        )

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows `indices`, in that order (repeats allowed)."""
        if self.lengths is None:
            return
        indices = indices.to(self.lengths.device)
        self.lengths = self.lengths.index_select(0, indices)
        self.open = [states.index_select(0, indices) for states in self.open]
        self.slots = [None if slots is None else slots.index_select(0, indices) for slots in self.slots]
        self.reconstructions = [states.index_select(0, indices) for states in self.reconstructions]
        for stack in self._stacks():
            stack.select(indices)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Beam search: row i goes on from row ``beam_idx[i]``."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        if self.lengths is not None:
            rows = torch.arange(self.batch_size, device=self.lengths.device)
            self.batch_select_indices(rows.repeat_interleave(repeats))
