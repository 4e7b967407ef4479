"""One step of vLLM's scheduler as segments of our attention: all decoding requests together, each prefill by itself."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch

from photon_train.models.attention_photon import Segment, load_kernels, unrotate
from photon_train.models.configuration_photon import PhotonConfig
from photon_train.models.families_photon import has_rotation, is_interleaved, rotation_kind
from photon_train.models.memory_segment_photon import MemorySegment
from photon_train.models.segments_photon import FullSegment, WindowSegment
from photon_train.models.stores_photon import KeyValue, SlotMapping

from .stores import PagedElements, PagedPrefix, PagedTokens, PagedUnits, write_tokens


@dataclass(frozen=True)
class StepMetadata:
    """What vLLM says of a step to the layers of one group.

    Attributes:
        starts: First token of each request in the step, and the number of all, ``[n + 1]`` on the host.
        lengths: Tokens of each request, those of the step included, ``[n]``.
        block_table: ``[n, width]``.
        slots: Slot of each token, ``[tokens]``.
    """

    starts: torch.Tensor
    lengths: torch.Tensor
    block_table: torch.Tensor
    slots: torch.Tensor


class Layout:
    """Which cache each layer of a model has, and what all layers need.

    Args:
        config: The model's.
        rotation: ``positions [B or 1, E], layer -> cosine, sine [B or 1, E, D]``.

    Attributes:
        layers, units: By layer, its attention and the cache of its latents; each has `layer_name` and `kv_cache`.
        kind: Of a layer, ``("window", W)``, ``("local", W)`` for a window of the family's own, or ``("full", 0)``.
        segment_kind: Of a layer, equal for layers that share a segment: of one kind, and with memory, rotated alike.
    """

    def __init__(self, config: PhotonConfig, rotation: Callable) -> None:
        self.config, self.rotation = config, rotation
        self.layers: dict[int, Any] = {}
        self.units: dict[int, Any] = {}
        # Asked for every layer of every step, and transformers' configurations answer slowly.
        self.kind, self.segment_kind = functools.cache(self._kind), functools.cache(self._segment_kind)

    def _kind(self, layer: int) -> tuple[str, int]:
        if self.config.has_window(layer):
            return "window", self.config.window
        own = self.config.family_window(layer)
        return ("full", 0) if own is None else ("local", own)

    def _segment_kind(self, layer: int) -> tuple:
        has_memory = layer in self.units
        rotated = (has_rotation(self.config, layer), rotation_kind(self.config, layer)) if has_memory else ()
        return (*self.kind(layer), has_memory, *rotated)

    def caches(self, kind: tuple[str, int]) -> dict[int, torch.Tensor]:
        """The caches of the layers of a kind."""
        return {layer: attention.kv_cache for layer, attention in self.layers.items() if self.kind(layer) == kind}


class PagedWindowSegment(WindowSegment):
    """A window whose past lies in blocks."""

    ring: PagedTokens

    def _decode_near(
        self, layer: int, query: torch.Tensor, scale: float, softcap: float | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.new.backend != "triton":
            return super()._decode_near(layer, query, scale, softcap)
        keys, values, block_table = self.ring.operands(layer)
        return load_kernels().paged_decode_attention(
            query,
            keys,
            values,
            self.index + 1,
            scale,
            rows=self.new.kernel_rows,
            block_table=block_table,
            start=self.start,
            num_sinks=self.num_sinks,
            return_lse=True,
            backend="triton",
        )


class UnitsSegment(PagedWindowSegment, MemorySegment):
    """A memory segment that packs in a call of its own, so that no request of the step reads before all have packed."""

    units: PagedUnits

    def attend(self, module, query, key, value, scale, softcap=None, sink_logits=None):
        kind = MemorySegment if module.memory.cells else WindowSegment  # cells may be other ranks'
        return kind.attend(self, module, query, key, value, scale, softcap, sink_logits)

    @cached_property
    def _packing(self) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...], SlotMapping]:
        """Of decoding requests: those whose unit leaves the window, its tokens, their rotation, and the unit's slot."""
        device, count = self.index.device, self.new.batch
        rows = [row for row, (had, has) in enumerate(zip(*self.host_packed, strict=True)) if has > had]
        rows = torch.tensor(rows, device=device)
        batch = torch.arange(len(rows), device=device)
        tokens, unit = (each.expand(count, -1)[rows] for each in (self._tokens, self.unit))
        rotary = tuple(part.expand(count, -1, -1)[rows] for part in self.token_rotation)
        return rows, tokens, rotary, SlotMapping(rows, torch.zeros_like(batch), unit[:, 0], batch)

    def pack_departed(self, module, key: torch.Tensor, value: torch.Tensor) -> None:
        """Pack the units that leave their window in this step, from ``key, value [n, Hkv, T, D]`` and the blocks."""
        if not self.num_new:
            return
        memory, layer = module.memory, module.layer_idx
        if not self._decodes(key):
            keys, values = self._take(layer, memory.take_cells(key), memory.take_cells(value), memory)
            stored = memory.pack(unrotate(keys, self.token_rotation, self.is_interleaved), values)[1]
            self.units.write(layer, self.unit_slots, *stored)
            return
        rows, tokens, rotary, slot_mapping = self._packing
        keys, values = (memory.take_cells(states) for states in self.ring.take(layer, rows, tokens))
        stored = memory.pack(unrotate(keys, rotary, self.is_interleaved), values)[1]
        self.units.write(layer, slot_mapping, *stored)

    def _pack(self, module, key, value) -> KeyValue | None:
        if not self.has_units:
            return None
        stored = self.units.read(module.layer_idx, None, max(self.host_packed[1]))
        return module.memory.load(stored, key.dtype)

    def _pack_departed(self, module) -> None:
        """`pack_departed` has."""


class StepPart:
    """Requests of a step that are computed together.

    Args:
        layout: The model's caches.
        metadata: Of every cache, by its name.
        rows: The requests.
        tokens: Their tokens in the step; one each, or those of a single request.
        lengths: Tokens of each request, those of the step included.
        backend: `torch` or `triton` (used at one token each).
    """

    def __init__(
        self,
        layout: Layout,
        metadata: Mapping[str, StepMetadata],
        rows: slice,
        tokens: slice,
        lengths: list[int],
        backend: str,
    ) -> None:
        self.layout, self.metadata, self.rows, self.tokens = layout, metadata, rows, tokens
        self.lengths, self.num_new = lengths, (tokens.stop - tokens.start) // len(lengths)
        self.past = [length - self.num_new for length in lengths]
        device = next(iter(metadata.values())).block_table.device
        base = self.past[0] if len(lengths) == 1 else None
        past = torch.tensor(self.past, device=device)
        self.index = past[:, None] + torch.arange(self.num_new, device=device)
        self.new = PagedElements(len(lengths), self.index, base, has_past=any(self.past), backend=backend)
        self._segments: dict[tuple, Segment] = {}
        self._tables: dict[int, torch.Tensor] = {}

    def rows_of(self, states: torch.Tensor) -> torch.Tensor:
        """``[tokens of the step, H, D]`` as ``[n, H, T, D]``."""
        return states[self.tokens].unflatten(0, (len(self.lengths), self.num_new)).transpose(1, 2)

    def segment(self, layer: int) -> Segment:
        """What the layer's attention does."""
        kind = self.layout.segment_kind(layer)
        if kind not in self._segments:
            self._segments[kind] = self._make(kind[:2], layer if layer in self.layout.units else None)
        return self._segments[kind]

    def _table(self, cache: Any) -> torch.Tensor:
        """The block table of a cache for these requests, one tensor for all caches that share it."""
        table = self.metadata[cache.layer_name].block_table
        if id(table) not in self._tables:
            self._tables[id(table)] = table[self.rows].long()
        return self._tables[id(table)]

    def _make(self, kind: tuple[str, int], memory_of: int | None) -> Segment:
        config, layout, index = self.layout.config, self.layout, self.index
        name, window = kind

        def table(layer: int) -> torch.Tensor:
            return self._table(layout.layers[layer])

        if name == "full":
            return FullSegment(self.new, PagedPrefix(layout.caches(kind), table, self.lengths), max(self.lengths))
        # One token per request is read with the tokens before it, several read those before them.
        stop = self.lengths if self.num_new == 1 else self.past
        if name == "local":
            first = [had - window + 1 for had in self.past]
            store = PagedTokens(layout.caches(kind), table, first, stop, 0, self.lengths)
            return PagedWindowSegment(self.new, index - window + 1, window - 1, ring=store, fused="no")
        # A unit that leaves the window now lies before the first token's window.
        first = [config.window_start(had - 1) for had in self.past]
        store = PagedTokens(layout.caches(kind), table, first, stop, config.num_sinks, self.lengths)
        settings = {
            "fused": "no",
            "start": config.window_start(index),
            "reach": config.window - 1 + (config.chunk_size - 1 if config.memory_cells else 0),
            "period": config.chunk_size if config.memory_cells else 1,
            "num_sinks": config.num_sinks,
            "ring": store,
        }
        if memory_of is None:
            return PagedWindowSegment(self.new, **settings)
        counts = [[config.num_units(length) for length in lengths] for lengths in (self.past, self.lengths)]
        units = PagedUnits(
            config,
            {layer: cache.kv_cache for layer, cache in layout.units.items()},
            lambda layer: self._table(layout.units[layer]),
            counts[1],
        )
        return UnitsSegment(
            self.new,
            **settings,
            chunk_size=config.chunk_size,
            units=units,
            packed=tuple(torch.tensor(count, device=index.device) for count in counts),
            host_packed=tuple(counts),
            rotation=partial(layout.rotation, layer=memory_of),
            is_interleaved=is_interleaved(config),
        )


class Step:
    """A step of the scheduler.

    Args:
        layout: The model's caches.
        metadata: Of every cache, by its name.
        backend: How requests with one token are computed: `torch` or `triton`; None: by kernels on a GPU.
    """

    def __init__(self, layout: Layout, metadata: Mapping[str, StepMetadata], backend: str | None = None) -> None:
        self.metadata = metadata
        some = next(iter(metadata.values()))
        self.backend = backend or ("triton" if some.block_table.is_cuda else "torch")
        starts, lengths = some.starts.tolist(), some.lengths.tolist()
        self.parts = list(self._parts(layout, starts, lengths))

    def _parts(self, layout: Layout, starts: list[int], lengths: list[int]) -> Iterator[StepPart]:
        # Requests with one token come first (`reorder_batch_threshold`).
        new = [stop - start for start, stop in zip(starts, starts[1:], strict=False)]
        ones = next((row for row, count in enumerate(new) if count != 1), len(new))
        if ones:
            yield StepPart(layout, self.metadata, slice(0, ones), slice(0, ones), lengths[:ones], self.backend)
        for row in range(ones, len(new)):
            if new[row]:
                tokens = slice(starts[row], starts[row + 1])
                rows = slice(row, row + 1)
                yield StepPart(layout, self.metadata, rows, tokens, lengths[rows], self.backend)

    def attend(
        self, module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, out: torch.Tensor
    ) -> None:
        """Write the step's keys and values of a layer to its blocks, and attend.

        Args:
            module: The layer's attention: `layer_idx`, `layer_name`, `kv_cache`, `scale`, `softcap`,
                `sink_logits` and `memory`.
            query: ``[tokens, Hq, D]``, rotated; key, value: ``[tokens, Hkv, D]``.
            out: Filled in place, as `query`.
        """
        slots = self.metadata[module.layer_name].slots
        write_tokens(module.kv_cache, slots, key[: len(slots)], value[: len(slots)])
        segments = [(part, part.segment(module.layer_idx)) for part in self.parts]
        for part, segment in segments:
            if isinstance(segment, UnitsSegment):
                segment.pack_departed(module, part.rows_of(key), part.rows_of(value))
        for part, segment in segments:
            states = (part.rows_of(each) for each in (query, key, value))
            found = segment.attend(module, *states, module.scale, module.softcap, module.sink_logits)
            out[part.tokens] = found.transpose(1, 2).flatten(0, 1)
