"""One-token decoding with a `PhotonCache`, and filling the cache from a whole-sequence pass.

The teacher-forced forward of `PhotonModel` is the reference; this computes the same function one token at a time.
Every row of the batch has its own length and chunk phase: a level works only on the rows whose chunk closes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from .attention_photon import KeyValue, sdpa, unit_log_count
from .cache_photon import PhotonCache, StackCache
from .latent_photon import attend_folded, fold_queries, unfold_values

if TYPE_CHECKING:
    from .modeling_photon import PhotonModel

BACKENDS = ("torch", "triton")
PROTOCOLS = ("hiergen", "recgen")


def load_kernels():
    """The optional kernel package.

    Raises:
        ImportError: if it is not installed; the message names the package to install.
    """
    try:
        import photon_kernels
    except ImportError as error:
        raise ImportError(
            "backend 'triton' needs the photon_kernels package: install photon-train[serve], or use backend 'torch'"
        ) from error
    return photon_kernels


def append_layer(
    stack: StackCache, layer: int, rows: torch.Tensor, entries: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> list:
    """What `cache_append` of the kernels stores of ``key, value [n, Hkv, q, D]`` at ``entries [n, q]``."""
    keys, values, pages = stack.operands(layer)
    make = load_kernels().Append
    return [make(key, keys, rows, entries, pages), make(value, values, rows, entries, pages)]


@dataclass
class StepSpan:
    """Attention of newly fed elements over a cache; writes them first.

    Attributes:
        cache: The stack's cache; `rows [n]` of it are fed.
        entries: Where the new elements go, ``[n, q]``; `order`: their sequence indices, ``[n, q]``.
        first: Oldest visible sequence index of each row, ``[n]``.
        num_sinks: Entries at the front that stay visible.
        grows: Whether the cache grows (entries are then in order).
        backend: `torch` or `triton`.
    """

    cache: StackCache
    rows: torch.Tensor
    entries: torch.Tensor
    order: torch.Tensor
    first: torch.Tensor
    num_sinks: int = 0
    grows: bool = False
    backend: str = "torch"

    def __post_init__(self) -> None:
        self.cache.place(self.rows, self.entries, self.order)

    @cached_property
    def visible(self) -> torch.Tensor:
        """Which entries each new element sees, ``[n, q, N]``; the same in every layer."""
        held = self.cache.held(self.rows)[:, None]
        sink = torch.arange(held.shape[2], device=held.device) < self.num_sinks
        return (held >= 0) & (held <= self.order[:, :, None]) & ((held >= self.first[:, None, None]) | sink)

    def attend(self, layer, query, key, value, scale, dropout, sliding_window):
        self._store(layer, key, value)
        if self.backend == "triton":
            return self._attend_kernels(layer, query, scale, sliding_window)
        keys, values = self._keys_values(layer)
        mask = self._mask(keys.dtype)
        if sliding_window is not None and self.grows:
            held = self.cache.held(self.rows)[:, None]
            mask = mask & (held > self.order[:, :, None] - sliding_window)
        return sdpa(query, keys, values, scale, mask=mask[:, None])

    def _store(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        if self.backend != "triton":
            self.cache.write(layer, self.rows, self.entries, key, value)
            return
        appends = append_layer(self.cache, layer, self.rows, self.entries, key, value)
        load_kernels().cache_append(appends, backend="triton")

    def _keys_values(self, layer: int) -> KeyValue:
        return self.cache.read(layer, self.rows)

    def _mask(self, dtype: torch.dtype) -> torch.Tensor:
        return self.visible

    def _attend_kernels(self, layer, query, scale, sliding_window):
        if not self.grows:
            return load_kernels().window_decode_attention(
                query, *self._window(layer), scale, num_sinks=self.num_sinks, rows=self.rows, backend="triton"
            )
        keys, values, pages = self.cache.operands(layer)
        starts = None if sliding_window is None else self.order - sliding_window + 1
        return load_kernels().summary_decode_attention(
            query, keys, values, self.order + 1, scale, starts, rows=self.rows, pages=pages, backend="triton"
        )

    def _window(self, layer: int) -> tuple[torch.Tensor, ...]:
        """What a kernel reads of a ring: keys, values, order, first and last visible."""
        keys, values, _ = self.cache.operands(layer)
        return keys, values, self.cache.order, self.first, self.order


@dataclass
class MemoryStepSpan(StepSpan):
    """A `StepSpan` whose softmax also holds the visible units of a memory layer.

    Attributes:
        units: The level's unit cache; `visible_units [n]`: units that lie outside each row's window.
        unit_span: Tokens under a unit.
    """

    units: StackCache | None = None
    visible_units: torch.Tensor | None = None
    unit_span: int = 1

    @cached_property
    def _log_count(self) -> torch.Tensor:
        return unit_log_count(self.units.size, self.unit_span, self.num_sinks, self.order.device)

    def _keys_values(self, layer: int) -> KeyValue:
        near, far = self.cache.read(layer, self.rows), self.units.read(layer, self.rows)
        return torch.cat([near[0], far[0]], dim=2), torch.cat([near[1], far[1]], dim=2)

    @cached_property
    def _bias(self) -> torch.Tensor:
        """Additive mask over the window's entries and the units, ``[n, q, N + U]``."""
        index = torch.arange(self.units.size, device=self.order.device)
        outside = (index < self.visible_units[:, None])[:, None].expand(-1, self.order.shape[1], -1)
        near = torch.zeros_like(self.visible, dtype=torch.float32).masked_fill(~self.visible, -torch.inf)
        far = self._log_count.expand(outside.shape).masked_fill(~outside, -torch.inf)
        return torch.cat([near, far], dim=2)

    def _mask(self, dtype: torch.dtype) -> torch.Tensor:
        return self._bias.to(dtype)

    def _attend_kernels(self, layer, query, scale, sliding_window):
        kernels = load_kernels()
        keys, values, pages = self.units.operands(layer)
        return kernels.summary_decode_attention(
            query,
            keys,
            values,
            self.visible_units[:, None].expand_as(self.order),
            scale,
            unit_bias=self._log_count,
            rows=self.rows,
            pages=pages,
            window=kernels.Window(*self._window(layer), self.num_sinks),
            backend="triton",
        )


@dataclass
class LatentStepSpan(StepSpan):
    """A `StepSpan` of one token per row whose softmax also holds the tokens under a latent memory's visible units.

    Attributes:
        model: Holds the converters, and unrotates queries.
        units: The level's latents; `visible_units [n]`: units that lie outside each row's window.
        unit_span: Tokens under a unit.
        position: Of the new tokens, ``[n, 1]``.
    """

    model: PhotonModel | None = None
    units: StackCache | None = None
    visible_units: torch.Tensor | None = None
    unit_span: int = 1
    position: torch.Tensor | None = None

    @cached_property
    def _far(self) -> torch.Tensor:
        """Which tokens under units are seen, ``[n, U * S]``: sinks are seen beside the window."""
        token = torch.arange(self.units.size * self.unit_span, device=self.order.device)
        return (token // self.unit_span < self.visible_units[:, None]) & (token >= self.num_sinks)

    def attend(self, layer, query, key, value, scale, dropout, sliding_window):
        self._store(layer, key, value)
        content = self.model.turn_back(query, self.position)[:, :, 0]
        source = self.model.config.source_of_layer[layer]
        converter = self.model.levels[0].decoder.memory[str(layer)]
        if self.backend == "triton":
            return self._attend_latents(layer, source, query, content, converter, scale)
        near, latents = self.cache.read(layer, self.rows), self.units.read(source, self.rows)
        visible = torch.cat([self.visible[:, 0], self._far], dim=1)
        return attend_folded(query[:, :, 0], content, near, latents, converter, visible, scale)[:, :, None]

    def _attend_latents(self, layer, source, query, content, converter, scale):
        """Window and latents apart, merged by their log-sum-exps: a query always sees its own token in the window."""
        kernels = load_kernels()
        near, near_lse = kernels.window_decode_attention(
            query,
            *self._window(layer),
            scale,
            num_sinks=self.num_sinks,
            rows=self.rows,
            return_lse=True,
            backend="triton",
        )
        keys, values, pages = self.units.operands(source)
        mixed, mass, far_lse = kernels.latent_decode(
            *fold_queries(content, converter),
            keys,
            values,
            self.visible_units,
            scale,
            first_token=self.num_sinks,
            rows=self.rows,
            pages=pages,
            backend="triton",
        )
        far = unfold_values(mixed, mass, converter)
        share = torch.sigmoid(far_lse - near_lse[:, :, 0])[:, :, None, None]
        return (near * (1 - share) + far[:, :, None] * share).to(query.dtype)


@dataclass
class Trace:
    """What a whole-sequence pass leaves for the cache; every list has one entry per level.

    Attributes:
        inputs: States that the level's chunker read, ``[B, units below, d]``.
        slots: The level's slots, ``[B, units, R, d]``, or None with `memory`; `conditions`: what they were made of.
        encoders, decoders: Keys and values by layer; isolated decoders' are folded to ``[B * groups, ...]``.
        units: Unit keys and values by memory layer.
    """

    inputs: list[torch.Tensor]
    slots: list[torch.Tensor | None]
    conditions: list[torch.Tensor | None]
    encoders: list[dict[int, KeyValue]]
    decoders: list[dict[int, KeyValue]]
    units: dict[int, KeyValue]

    @classmethod
    def empty(cls, num_levels: int) -> Trace:
        unset = [None] * num_levels
        return cls([], unset.copy(), unset, [{} for _ in range(num_levels)], [{} for _ in range(num_levels)], {})


def _counted(counts: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Sequence indices ``0 ... counts[b] - 1`` per row, -1 beyond: ``[B, max(counts)]``."""
    index = torch.arange(int(counts.max()), device=device)
    return torch.where(index < counts[:, None], index, -1)


def fill_cache(cache: PhotonCache, trace: Trace, lengths: torch.Tensor) -> None:
    """Make `cache` what decoding the first ``lengths[b]`` tokens of each row one by one would have made it."""
    config, device = cache.config, lengths.device
    batch = torch.arange(lengths.shape[0], device=device)
    cache.lengths = lengths.clone()
    for index, level in enumerate(config.levels):
        units = lengths // config.span(index + 1)
        below = lengths // config.span(index)
        chunk = level["chunk_size"]
        states = trace.inputs[index]
        place = (units[:, None] * chunk + torch.arange(chunk, device=device)).clamp(max=max(states.shape[1] - 1, 0))
        cache.open.append(
            states[batch[:, None], place].detach().clone()
            if states.shape[1]
            else states.new_zeros(len(batch), chunk, states.shape[2])
        )
        _fill_encoder(cache.encoders[index], trace.encoders[index], units)
        slots = trace.slots[index]
        cache.slots.append(None if slots is None else slots[batch, units].detach().clone())
        if cache.protocol == "recgen" and index + 1 < config.num_levels:
            cache.reconstructions.append(trace.conditions[index][batch, units].detach().clone())
        if cache.groups[index] is not None:
            fill_group(cache.groups[index], trace.decoders[index], units, level["num_slots"] + below % chunk)
    if config.layout == "stream":
        recorded = trace.decoders[0]
        cache.window.fill(recorded, cache.geometry.held(lengths))
        cache.full.fill(recorded, _counted(cache.geometry.num_elements(lengths), device))
    for level, stack in cache.memory.items():
        stack.fill(trace.units, _counted(lengths // config.span(level), device))


def _fill_encoder(stack: StackCache, recorded: dict[int, KeyValue], units: torch.Tensor) -> None:
    if stack.capacity is None:
        order = _counted(units, units.device)
    else:
        order = ring_order(units, stack.capacity)
    stack.fill(recorded, order)


def ring_order(counts: torch.Tensor, capacity: int) -> torch.Tensor:
    """Elements in a ring of `capacity` entries after ``counts [B]`` elements, ``[B, capacity]``, -1 where empty."""
    entries, last = torch.arange(capacity, device=counts.device), (counts - 1)[:, None]
    return (last - (last - entries) % capacity).clamp(min=-1)


def fill_group(stack: StackCache, recorded: dict[int, KeyValue], group: torch.Tensor, count: torch.Tensor) -> None:
    """Fill an isolated decoder's cache with the ``group[b]``-th group of each row, of which `count [B]` are there."""
    batch = torch.arange(len(group), device=group.device)
    opened = {}
    for layer, states in recorded.items():
        key, value = (tensor.unflatten(0, (len(group), -1))[batch, group] for tensor in states)
        opened[layer] = (key, value)
    entries = torch.arange(stack.capacity, device=group.device)
    order = torch.where(entries < count[:, None], entries, -1)
    stack.fill(opened, order, source=entries.expand_as(order))


@dataclass
class Closed:
    """The rows whose chunk closes at a level in this step.

    Attributes:
        which: Their places among the rows of the level below, on the host; `rows [n]`: the rows themselves.
        counts: Units that each of them has, the new one included, on the host.
        summary, state: Input and output of the encoder, ``[n, d]``.
    """

    which: list[int]
    rows: torch.Tensor
    counts: list[int]
    summary: torch.Tensor
    state: torch.Tensor


class TokenStepper:
    """Feeds one token per row.

    Which chunks close is decided from lengths on the host, so that no level works in vain and no GPU is waited for.
    The work itself is done by *parts*: methods of a level, rows and tensors with one entry per row, which find
    everything else in the cache and whose shapes follow from the number of rows.

    Args:
        model: A `PhotonModel`.
        cache: Its non-empty cache, updated in place.
        backend: `torch` or `triton`.
        run: How a part is run, ``run(part, level, rows, *tensors)``; default: it is called.
    """

    def __init__(self, model, cache: PhotonCache, backend: str, run: Callable | None = None) -> None:
        self.model, self.cache, self.backend = model, cache, backend
        self.config = model.config
        self.levels = model.levels
        self.run = run or (lambda part, level, rows, *tensors: part(level, rows, *tensors))

    def feed(self, rows: torch.Tensor, embeds: torch.Tensor, lengths: list[int] | None = None) -> torch.Tensor:
        """Feed a token to each of `rows`.

        Args:
            rows: Rows of the cache, ``[n]``, ascending.
            embeds: Their tokens' embeddings, ``[n, d]``.
            lengths: Tokens that each row holds already; None asks the cache.

        Returns:
            The states that predict the next tokens, ``[n, d]`` (before the norm).
        """
        lengths = self.cache.lengths[rows].tolist() if lengths is None else lengths
        chunk = self.config.levels[0]["chunk_size"]
        if self.config.layout == "stream":
            starts = [place for place, length in enumerate(lengths) if length % chunk == 0]
            if starts and self.config.conditioning == "slots":
                self.run(self._feed_stream_slots, 0, self._at(rows, starts))
            out = self.run(self._feed_stream, 0, rows, embeds)
        else:
            out = torch.zeros_like(embeds)
            inside = [place for place, length in enumerate(lengths) if length % chunk < chunk - 1]
            if inside:
                fed = self.run(self._feed_inside, 0, self._at(rows, inside), self._at(embeds, inside))
                self._put(out, inside, fed)
            self.run(self._hold, 0, rows, embeds)
        closed = self._ascend(rows, [length + 1 for length in lengths])
        if closed and self.config.conditioning != "memory":
            started = self._descend(closed)
            if self.config.layout == "block":
                self._put(out, closed[0].which, started)
        return out

    @staticmethod
    def _at(states: torch.Tensor, places: list[int]) -> torch.Tensor:
        return states if len(places) == len(states) else states[torch.tensor(places, device=states.device)]

    @staticmethod
    def _put(states: torch.Tensor, places: list[int], new: torch.Tensor) -> None:
        states[torch.tensor(places, device=states.device)] = new.to(states.dtype)

    def _hold(self, level: int, rows: torch.Tensor, states: torch.Tensor) -> None:
        """Count a token of each row and keep its state for the chunker."""
        position, chunk = self.cache.lengths[rows], self.config.levels[0]["chunk_size"]
        self.cache.open[0][rows, position % chunk] = states.to(self.cache.open[0].dtype)
        self.cache.lengths[rows] = position + 1

    def _new_unit(self, level: int, rows: torch.Tensor) -> torch.Tensor:
        """Index of the unit of `level` (from 0) that the last token has completed, ``[n]``."""
        return self.cache.lengths[rows] // self.config.span(level + 1) - 1

    # --- the token stream ---

    def _stream_spans(self, rows, order, position) -> list[StepSpan]:
        cache, config, geometry = self.cache, self.config, self.cache.geometry
        shared = {"rows": rows, "order": order, "backend": self.backend}
        near = {"entries": geometry.entry(order), "first": geometry.first_visible(position)}
        spans: dict[object, StepSpan] = {}
        if cache.window.layers:
            spans["window"] = StepSpan(cache.window, **near, **shared, num_sinks=geometry.num_sinks)
        if cache.full.layers:
            everything = torch.zeros_like(position)
            spans["full"] = StepSpan(cache.full, entries=order, first=everything, grows=True, **shared)
        for level, units in cache.memory.items():
            span = config.span(level)
            start = (position - config.window + 1).clamp(min=0) // config.window_alignment * config.window_alignment
            seen = {"units": units, "visible_units": start // span, "unit_span": span, "num_sinks": geometry.num_sinks}
            if config.memory_pooling == "latent":
                seen |= {"model": self.model, "position": position[:, None]}
            make = LatentStepSpan if config.memory_pooling == "latent" else MemoryStepSpan
            spans[level] = make(cache.window, **near, **shared, **seen)
        kinds = [
            "full" if layer in config.full_attention_layers else config.memory_level_of(layer) or "window"
            for layer in range(config.num_token_layers)
        ]
        return [spans[kind] for kind in kinds]

    def _feed_stream(self, level: int, rows: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
        config, decoder, geometry = self.config, self.levels[0].decoder, self.cache.geometry
        position = self.cache.lengths[rows]
        spans = self._stream_spans(rows, geometry.element_of_token(position)[:, None], position)
        hidden = decoder.input_scale(embeds)[:, None]
        rotary = self.model.rotary_emb(hidden, position[:, None])
        hidden = decoder(hidden, rotary, spans, stop=config.branch_layer)
        branch = hidden[:, 0] if config.branch_layer else embeds
        if config.conditioning == "residual":
            slots = self.cache.slots[0][rows]
            chunk = config.levels[0]["chunk_size"]
            which = torch.zeros_like(position) if slots.shape[1] == 1 else position % chunk
            hidden = hidden + slots[torch.arange(len(which), device=which.device), which][:, None]
        out = decoder(hidden, rotary, spans, start=config.branch_layer)[:, 0]
        self._hold(0, rows, branch)
        return out

    def _feed_stream_slots(self, level: int, rows: torch.Tensor) -> None:
        position, slots = self.cache.lengths[rows], self.cache.slots[0][rows]
        count = slots.shape[1]
        order = self.cache.geometry.element_of_token(position)[:, None] - count
        order = order + torch.arange(count, device=order.device)
        rotary = self.model.rotary_emb(slots, position[:, None].expand(-1, count))
        self.levels[0].decoder(slots, rotary, self._stream_spans(rows, order, position))

    # --- isolated decoders ---

    def _run_group(self, level: int, rows: torch.Tensor, states: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
        """Run ``states [n, q, d]`` as positions ``first ... first + q - 1`` of the open group; the last output."""
        order = first[:, None] + torch.arange(states.shape[1], device=rows.device)
        span = StepSpan(self.cache.groups[level], rows, order, order, torch.zeros_like(first), backend=self.backend)
        decoder = self.levels[level].decoder
        rotary = self.model.rotary_emb(states, order)
        return decoder(states, rotary, [span] * len(decoder.layers))[:, -1]

    def _feed_group(self, level: int, rows: torch.Tensor, state: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
        state = self.levels[level].decoder.input_scale(state)
        return self._run_group(level, rows, state[:, None], self.config.levels[level]["num_slots"] + offset)

    def _feed_inside(self, level: int, rows: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
        """Tokens that do not close their chunk predict the next one inside it."""
        return self._feed_group(0, rows, embeds, self.cache.lengths[rows] % self.config.levels[0]["chunk_size"])

    # --- bottom-up: close what is complete ---

    def _ascend(self, rows: torch.Tensor, counts: list[int]) -> dict[int, Closed]:
        """Close chunks from the bottom, by level; `counts`: tokens of each row."""
        closed = {}
        for index, level in enumerate(self.config.levels):
            chunk = level["chunk_size"]
            which = [place for place, count in enumerate(counts) if count % chunk == 0]
            if not which:
                break
            rows, counts = self._at(rows, which), [counts[place] // chunk for place in which]
            closed[index] = Closed(which, rows, counts, *self.run(self._close, index, rows))
        return closed

    def _close(self, level: int, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Summarise and encode the complete chunk of each row; the new units' summaries and states, ``[n, d]``."""
        unit = self._new_unit(level, rows)
        if self.cache.protocol == "recgen" and level + 1 < self.config.num_levels:
            summary = state = self.cache.reconstructions[level][rows]
        else:
            summary = self._summarise(level, rows)
            state = self._encode(level, rows, unit, summary)
        self._keep(level, rows, unit, state)
        return summary, state

    def _summarise(self, index: int, rows: torch.Tensor) -> torch.Tensor:
        chunker = self.levels[index].chunker
        if self.backend == "triton":
            kernels = load_kernels()
            return kernels.gather_chunk_project(
                self.cache.open[index], rows, chunker.proj.weight, chunker.scale, backend="triton"
            )
        return chunker(self.cache.open[index][rows])

    def _encode(self, index: int, rows: torch.Tensor, unit: torch.Tensor, summary: torch.Tensor) -> torch.Tensor:
        encoder, cache = self.levels[index].encoder, self.cache.encoders[index]
        if not encoder.layers:
            return summary
        window, order = cache.capacity, unit[:, None]
        span = StepSpan(
            cache,
            rows,
            order if window is None else order % window,
            order,
            torch.zeros_like(unit) if window is None else unit - window + 1,
            grows=window is None,
            backend=self.backend,
        )
        rotary = self.model.rotary_emb(summary, self.model.unit_positions(index, unit)[:, None])
        return encoder(summary[:, None], rotary, [span] * len(encoder.layers))[:, 0]

    def _keep(self, level: int, rows: torch.Tensor, unit: torch.Tensor, state: torch.Tensor) -> None:
        """Store what a new unit of `level` (from 0) leaves: its state in the open chunk above, its memory entries."""
        units, held = self._memory_entries(level + 1, rows, unit, state), None
        if level + 1 < self.config.num_levels:
            held, place = self.cache.open[level + 1], unit % self.config.levels[level + 1]["chunk_size"]
        stack = self.cache.memory.get(level + 1)
        if self.backend == "triton":
            kernels = load_kernels()
            appends = (
                [] if held is None else [kernels.Append(state[:, None, None], held[:, None], rows, place[:, None])]
            )
            for layer, (key, value) in units.items():
                appends += append_layer(stack, layer, rows, unit[:, None], key, value)
            kernels.cache_append(appends, backend="triton")
            return
        if held is not None:
            held[rows, place] = state.to(held.dtype)
        for layer, (key, value) in units.items():
            stack.write(layer, rows, unit[:, None], key, value)

    def _memory_entries(self, level: int, rows, unit, state) -> dict[int, KeyValue]:
        """Keys and values of the new units of `level` (from 1) for the layers that remember it; announces them."""
        stack, span = self.cache.memory.get(level), self.config.span(level)
        if stack is None:
            return {}
        stack.place(rows, unit[:, None], unit[:, None])
        token = unit[:, None] * span + torch.arange(span, device=unit.device)
        entries, window = self.cache.geometry.entry(token), self.cache.window
        units = {}
        for layer in stack.layers:
            keys = window.keys[layer][rows[:, None], :, entries].transpose(1, 2)
            values = window.values[layer][rows[:, None], :, entries].transpose(1, 2)
            units[layer] = self.model.pool_units(layer, keys, values, state[:, None], token)
        return units

    # --- top-down: condition what comes next ---

    def _descend(self, closed: dict[int, Closed]) -> torch.Tensor | None:
        """New slots at every closed level; with isolated chunks, the states that predict the next first tokens."""
        started = None
        for level in reversed(sorted(closed)):
            new = closed[level]
            if level < self.config.num_levels - 1:
                condition = self._condition_from_above(level, new, started)
            else:
                condition = new.state - new.summary if self.config.summary == "change" else new.state
            started = self.run(self._start, level, new.rows, condition)
        return started

    def _start(self, level: int, rows: torch.Tensor, condition: torch.Tensor) -> torch.Tensor | None:
        """Slots for what follows the new unit; an isolated decoder begins its next group with them."""
        if self.cache.protocol == "recgen" and level + 1 < self.config.num_levels:
            self.cache.reconstructions[level][rows] = condition.to(self.cache.reconstructions[level].dtype)
        slots = self.levels[level].converter(condition)
        self.cache.slots[level][rows] = slots.to(self.cache.slots[level].dtype)
        if self.cache.groups[level] is None:
            return None
        self.cache.groups[level].clear(rows)
        return self._run_group(level, rows, slots, torch.zeros_like(rows))

    def _condition_from_above(self, level: int, new: Closed, started: torch.Tensor | None) -> torch.Tensor:
        """The condition of the chunk after the new unit: from the decoder above, or from its slots without layers."""
        if self.cache.groups[level + 1] is None:
            return self.run(self._slot_from_above, level, new.rows)
        chunk = self.config.levels[level + 1]["chunk_size"]
        starts = [place for place, count in enumerate(new.counts) if count % chunk == 0]
        goes_on = [place for place, count in enumerate(new.counts) if count % chunk]
        condition = torch.zeros_like(new.state)
        if starts:
            self._put(condition, starts, started)
        if goes_on:
            fed = self.run(self._feed_above, level, self._at(new.rows, goes_on), self._at(new.state, goes_on))
            self._put(condition, goes_on, fed)
        return condition

    def _slot_from_above(self, level: int, rows: torch.Tensor) -> torch.Tensor:
        slots = self.cache.slots[level + 1][rows]
        following = (self._new_unit(level, rows) + 1) % self.config.levels[level + 1]["chunk_size"]
        child = torch.zeros_like(following) if slots.shape[1] == 1 else following
        return slots[torch.arange(len(child), device=child.device), child]

    def _feed_above(self, level: int, rows: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        """Feed a unit to the decoder above, inside its group."""
        offset = self._new_unit(level, rows) % self.config.levels[level + 1]["chunk_size"]
        return self._feed_group(level + 1, rows, state, offset)
