"""Feeding many tokens at once to sequences that already hold some: chunked prefill.

The same function as `TokenStepper`, for a segment that begins at a boundary of meta-contexts (no chunk is open there)
and ends anywhere. Keys are those of the cache before the segment, then the segment's own; what a ring will hold
afterwards is written back. The teacher-forced forward of `PhotonModel` remains the reference.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import torch
import torch.nn.functional as F

from photon_train.inference.cache import PagedCache
from photon_train.inference.pages import PagedStack
from photon_train.models.attention_photon import KeyValue, Span, sdpa, unit_log_count
from photon_train.models.cache_photon import StackCache
from photon_train.models.decoding_photon import Trace, fill_group, ring_order
from photon_train.models.latent_photon import widen_far, widen_near
from photon_train.models.modeling_photon import PhotonModel


@dataclass
class SegmentSpan:
    """Attention of a segment over a stack's cache and over itself; stores what the cache keeps.

    Attributes:
        cache: The stack's cache, `rows [n]` of it (ascending).
        order: Sequence indices of the segment's elements, ``[n, q]``, consecutive.
        first: Oldest index that each of them sees, ``[n, q]``.
        stop: Index after each row's last real element, ``[n]``; padding follows.
        after: What a ring's entries hold once the segment is stored, ``[n, N]``; None for pages.
        is_sink: Indices that stay visible, or None.
    """

    cache: StackCache
    rows: torch.Tensor
    order: torch.Tensor
    first: torch.Tensor
    stop: torch.Tensor
    after: torch.Tensor | None = None
    is_sink: Callable[[torch.Tensor], torch.Tensor] | None = None

    def __post_init__(self) -> None:
        self.past = self.cache.held(self.rows).clone()

    @cached_property
    def held(self) -> torch.Tensor:
        """Sequence index of every key, ``[n, N + q]``, -1 where empty."""
        return torch.cat([self.past, self.order], dim=1)

    @cached_property
    def visible(self) -> torch.Tensor:
        """Which keys each element sees, ``[n, q, N + q]``."""
        held = self.held[:, None]
        near = held >= self.first[:, :, None]
        if self.is_sink is not None:
            near = near | self.is_sink(held)
        return (held >= 0) & (held <= self.order[:, :, None]) & near

    def attend(self, layer, query, key, value, scale, dropout, sliding_window):
        keys, values = self._with_past(layer, key, value)
        mask = self.visible
        if sliding_window is not None and self.after is None:
            mask = mask & (self.held[:, None] > self.order[:, :, None] - sliding_window)
        return sdpa(query, keys, values, scale, mask=mask[:, None])

    def _with_past(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> KeyValue:
        """The cache's keys and values before the segment and the segment's own; the cache then has what it keeps."""
        past = self.cache.read(layer, self.rows)
        keys, values = torch.cat([past[0], key], dim=2), torch.cat([past[1], value], dim=2)
        if self.after is None:
            scatter_real(self.cache, layer, self.rows, self.order, self.stop, key, value)
        else:
            index = self._source[:, None, :, None]
            for stored, states in ((self.cache.keys, keys), (self.cache.values, values)):
                where = index.expand(-1, states.shape[1], -1, states.shape[3])
                stored[layer][self.rows] = states.gather(2, where)
        return keys, values

    @cached_property
    def _source(self) -> torch.Tensor:
        """For every entry of the ring, which of the ``N + q`` keys it holds afterwards, ``[n, N]``."""
        kept = torch.arange(self.past.shape[1], device=self.order.device)
        base = self.order[:, :1]
        return torch.where(self.after >= base, self.past.shape[1] + self.after - base, kept)

    def finish(self) -> None:
        """After the last layer: let the cache know which elements it holds."""
        if self.after is None:
            self.cache.counts[self.rows] = self.stop
        else:
            self.cache.order[self.rows] = self.after


def scatter_real(stack: PagedStack, layer, rows, order, stop, key, value) -> None:
    """Store those of ``key, value [n, Hkv, q, D]`` whose ``order [n, q]`` lies before ``stop [n]``."""
    row, place = (order < stop[:, None]).nonzero(as_tuple=True)
    stack.scatter(layer, rows[row], order[row, place], key[row, :, place], value[row, :, place])


@dataclass
class MemorySegmentSpan(SegmentSpan):
    """A `SegmentSpan` whose softmax also holds the units outside each element's window (DESIGN 4, `memory`).

    Attributes:
        units: The level's unit cache; `unit_span`: tokens under a unit.
        num_sinks: First tokens, which are counted beside the units.
        pool: ``(layer, keys, values) -> unit keys and values`` of the segment; set once the encoders have run.
    """

    units: PagedStack | None = None
    unit_span: int = 1
    num_sinks: int = 0
    pool: Callable[[int, torch.Tensor, torch.Tensor], KeyValue] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        count = self.order.shape[1] // self.unit_span
        base = self.order[:, :1] // self.unit_span
        self._new_units = base + torch.arange(count, device=self.order.device)
        self._held_units = torch.cat([self.units.held(self.rows), self._new_units], dim=1)

    @cached_property
    def _bias(self) -> torch.Tensor:
        """Additive mask ``[n, q, N + q + units]``; a unit counts as many times as it has tokens."""
        held = self._held_units
        table = unit_log_count(int(held.max()) + 1 if held.numel() else 1, self.unit_span, self.num_sinks, held.device)
        unit = held[:, None]
        outside = (unit >= 0) & ((unit + 1) * self.unit_span <= self.first[:, :, None])
        near = torch.zeros_like(self.visible, dtype=torch.float32).masked_fill(~self.visible, -torch.inf)
        far = table[held.clamp(min=0)][:, None].expand(outside.shape).masked_fill(~outside, -torch.inf)
        return torch.cat([near, far], dim=2)

    def attend(self, layer, query, key, value, scale, dropout, sliding_window):
        keys, values = self._with_past(layer, key, value)
        past, new = self.units.read(layer, self.rows), self.pool(layer, key, value)
        stop = self.stop // self.unit_span
        scatter_real(self.units, layer, self.rows, self._new_units, stop, *new)
        keys, values = torch.cat([keys, past[0], new[0]], dim=2), torch.cat([values, past[1], new[1]], dim=2)
        return sdpa(query, keys, values, scale, mask=self._bias[:, None].to(query.dtype))

    def finish(self) -> None:
        super().finish()
        self.units.counts[self.rows] = self.stop // self.unit_span


@dataclass
class LatentSegmentSpan(MemorySegmentSpan):
    """A `SegmentSpan` whose softmax also holds the tokens under the units outside each element's window.

    Attributes:
        model: Unpacks latents and unrotates queries.
        position: Tokens of the segment's elements, ``[n, q]``.
    """

    model: PhotonModel | None = None
    position: torch.Tensor | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._latents: dict[int, KeyValue] = {}

    @cached_property
    def _far(self) -> torch.Tensor:
        """Which tokens under the units before and in the segment each element sees, ``[n, q, units * S]``."""
        unit = self._held_units[:, None]
        outside = (unit >= 0) & ((unit + 1) * self.unit_span <= self.first[:, :, None])
        token = unit[..., None] * self.unit_span + torch.arange(self.unit_span, device=unit.device)
        return (outside[..., None] & (token >= self.num_sinks)).flatten(2)

    def attend(self, layer, query, key, value, scale, dropout, sliding_window):
        keys, values = self._with_past(layer, key, value)
        source = self.model.config.source_of_layer[layer]
        if source == layer:
            past, new = self.units.read(layer, self.rows), self.pool(layer, key, value)
            stop = self.stop // self.unit_span
            scatter_real(self.units, layer, self.rows, self._new_units, stop, *new)
            self._latents[layer] = tuple(torch.cat(pair, dim=2) for pair in zip(past, new, strict=True))
        far = widen_far(*self.model.unpack_units(layer, self._latents[source]))
        near = widen_near(query, self.model.turn_back(query, self.position), keys, values)
        keys, values = (torch.cat(pair, dim=2) for pair in zip(near[1:], far, strict=True))
        mask = torch.cat([self.visible, self._far], dim=2)
        return sdpa(near[0], keys, values, scale, mask=mask[:, None])[..., : query.shape[-1]]


class SegmentPass:
    """One segment of several sequences.

    Args:
        model: The hierarchy.
        cache: Announced with `begin`; the sequences' pages reach to the segment's end.
        rows: Rows of the sequences, ``[n]``, ascending.
    """

    def __init__(self, model: PhotonModel, cache: PagedCache, rows: torch.Tensor) -> None:
        self.model, self.cache, self.rows = model, cache, rows
        self.config, self.levels = model.config, model.levels
        self.start = cache.lengths[rows]
        self.spans: list[SegmentSpan] = []

    def feed(self, embeds: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """Feed the first ``counts[b]`` of ``embeds [n, T, d]``; the states that predict the next tokens, ``[n, d]``.

        Raises:
            ValueError: if a sequence does not stand at a boundary of meta-contexts.
        """
        if bool((self.start % self.config.top_span).any()):
            raise ValueError(f"a segment must begin at a multiple of {self.config.top_span} tokens")
        self.counts, self.stop = counts, self.start + counts
        length = embeds.shape[1]
        # As in the teacher-forced pass: to the end of the open meta-context, exact by causality.
        total = (length // self.config.top_span + 1) * self.config.top_span
        embeds = F.pad(embeds, (0, 0, 0, total - length))
        self.position = self.start[:, None] + torch.arange(total, device=embeds.device)
        self.trace = Trace.empty(self.config.num_levels)
        hidden = self._stream(embeds) if self.config.layout == "stream" else self._block(embeds)
        self._store_hierarchy()
        for span in self.spans:
            span.finish()
        self.cache.lengths[self.rows] = self.stop
        # An isolated decoder's state i predicts token i, a stream's predicts token i + 1.
        last = counts - 1 if self.config.layout == "stream" else counts
        return hidden[torch.arange(len(last), device=last.device), last]

    # --- the two layouts ---

    def _block(self, embeds: torch.Tensor) -> torch.Tensor:
        slots = self._descend(*self._ascend(embeds))
        return self.model._isolated(0, slots, embeds, self.trace)

    def _stream(self, embeds: torch.Tensor) -> torch.Tensor:
        config, decoder = self.config, self.levels[0].decoder
        if config.conditioning == "slots":
            return self._slot_stream(embeds, self._descend(*self._ascend(embeds)))
        spans = self._token_spans(self.position)
        rotary = self.model.rotary_emb(embeds, self.position)
        hidden = decoder(decoder.input_scale(embeds), rotary, spans, stop=config.branch_layer)
        branch = hidden if config.branch_layer else embeds
        summaries, states = self._ascend(branch)
        if config.conditioning == "memory":
            for level in set(config.memory_levels):
                pool = partial(self.model.pool_units, states=states[level - 1], position=self.position)
                for span in spans:
                    if isinstance(span, MemorySegmentSpan) and span.units is self.cache.memory[level]:
                        span.pool = pool
        else:
            slots = self._descend(summaries, states)
            repeats = config.levels[0]["chunk_size"] // slots.shape[2]
            hidden = hidden + slots.repeat_interleave(repeats, dim=2).flatten(1, 2)
        return decoder(hidden, rotary, spans, start=config.branch_layer)

    def _slot_stream(self, embeds: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        decoder, count, chunk = self.levels[0].decoder, slots.shape[2], self.config.levels[0]["chunk_size"]
        tokens = decoder.input_scale(embeds).unflatten(1, (-1, chunk))
        sequence = torch.cat([slots, tokens], dim=2).flatten(1, 2)
        position = self.position.unflatten(1, (-1, chunk))
        position = torch.cat([position[:, :, :1].expand(-1, -1, count), position], dim=2).flatten(1, 2)
        out = decoder(sequence, self.model.rotary_emb(sequence, position), self._token_spans(position))
        return out.unflatten(1, (-1, count + chunk))[:, :, count:].flatten(1, 2)

    def _token_spans(self, position: torch.Tensor) -> list[Span]:
        """One span per token-decoder layer, for elements at token ``position [n, q]``."""
        cache, config, geometry = self.cache, self.config, self.cache.geometry
        base = geometry.element_of_token(self.start)[:, None] - geometry.num_slots
        order = base + torch.arange(position.shape[1], device=position.device)
        shared = {"rows": self.rows, "order": order, "stop": geometry.num_elements(self.stop)}
        near = {"first": geometry.first_visible(position), "after": geometry.held(self.stop)}
        near |= {"is_sink": geometry.is_sink if config.num_sinks else None}
        spans: dict[object, SegmentSpan] = {}
        if cache.window.layers:
            spans["window"] = SegmentSpan(cache.window, **shared, **near)
        if cache.full.layers:
            spans["full"] = SegmentSpan(cache.full, **shared, first=torch.zeros_like(order))
        for level, units in cache.memory.items():
            memory = {"units": units, "unit_span": config.span(level), "num_sinks": config.num_sinks}
            make = MemorySegmentSpan
            if config.memory_pooling == "latent":
                make = LatentSegmentSpan
                memory |= {"model": self.model, "position": position}
            spans[level] = make(cache.window, **shared, **near, **memory)
        self.spans += spans.values()
        kinds = [
            "full" if layer in config.full_attention_layers else config.memory_level_of(layer) or "window"
            for layer in range(config.num_token_layers)
        ]
        return [spans[kind] for kind in kinds]

    # --- the hierarchy ---

    def _ascend(self, states: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Per level: the encoder's input and output, ``[n, units of the segment, d]``."""
        summaries, outputs = [], []
        for index, level in enumerate(self.levels):
            self.trace.inputs.append(states)
            summary = level.chunker(states.unflatten(1, (-1, self.config.levels[index]["chunk_size"])))
            states = self._encode(index, summary)
            summaries.append(summary)
            outputs.append(states)
        return summaries, outputs

    def _encode(self, index: int, summary: torch.Tensor) -> torch.Tensor:
        encoder, cache = self.levels[index].encoder, self.cache.encoders[index]
        if not encoder.layers:
            return summary
        span = self.config.span(index + 1)
        unit = self.start[:, None] // span + torch.arange(summary.shape[1], device=summary.device)
        stop, window = self.stop // span, cache.capacity
        first = torch.zeros_like(unit) if window is None else unit - window + 1
        after = None if window is None else ring_order(stop, window)
        self.spans.append(SegmentSpan(cache, self.rows, unit, first, stop, after))
        rotary = self.model.rotary_emb(summary, self.model.unit_positions(index, unit))
        return encoder(summary, rotary, [self.spans[-1]] * len(encoder.layers))

    def _descend(self, summaries: list[torch.Tensor], states: list[torch.Tensor]) -> torch.Tensor:
        """Slots of every level-1 chunk of the segment, ``[n, chunks, R, d]``."""
        config = self.config
        top = states[-1] - summaries[-1] if config.summary == "change" else states[-1]
        # The first group's slots were made when the group before it closed (or from the start state).
        first = self.cache.slots[-1][self.rows][:, None]
        slots = torch.cat([first, self.levels[-1].converter(top[:, :-1])], dim=1)
        for index in reversed(range(config.num_levels)):
            self.trace.slots[index] = slots
            if index == 0:
                break
            if self.levels[index].decoder is None:
                repeats = config.levels[index]["chunk_size"] // config.levels[index]["num_slots"]
                condition = slots.repeat_interleave(repeats, dim=2).flatten(1, 2)
            else:
                condition = self.model._isolated(index, slots, self.trace.inputs[index], self.trace)
            slots = self.levels[index - 1].converter(condition)
        return slots

    def _store_hierarchy(self) -> None:
        """Open chunks, slots in force and open groups at the segment's end."""
        batch = torch.arange(len(self.rows), device=self.rows.device)
        for index, level in enumerate(self.config.levels):
            units, below = self.counts // self.config.span(index + 1), self.counts // self.config.span(index)
            chunk, states, slots = level["chunk_size"], self.trace.inputs[index], self.trace.slots[index]
            place = units[:, None] * chunk + torch.arange(chunk, device=units.device)
            self.cache.open[index][self.rows] = states[batch[:, None], place].to(self.cache.open[index].dtype)
            if slots is not None:
                self.cache.slots[index][self.rows] = slots[batch, units].to(self.cache.slots[index].dtype)
            group = self.cache.groups[index]
            if group is not None:
                opened = StackCache(group.layers, group.capacity)
                fill_group(opened, self.trace.decoders[index], units, level["num_slots"] + below % chunk)
                group.assign(self.rows, opened)
