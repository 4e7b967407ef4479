"""The segment of a memory layer: a window, and the tokens under the units outside it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import torch

from .attention_photon import NewElements, unrotate
from .flex_photon import FlexMask, attend_window, far_ends, window_mask
from .memory_photon import LayerMemory, put_heads, take_heads, take_heads_back
from .segments_photon import MOST_SCORES, WindowSegment
from .softmax_photon import FarKeys, additive, merge, with_sink
from .stores_photon import KeyValue, SlotMapping


class MemorySegment(WindowSegment):
    """A window whose softmax also holds, one by one, the tokens under the units outside it, read from latents.

    A unit is packed when it leaves the window, from the keys and values that the ring still holds or from the segment's
    own. Sinks are seen beside the window, not under their unit.

    Args:
        chunk_size: S, tokens under a unit.
        units: Holds the latents; None: none are kept.
        packed: Units of each row before this segment and after it, ``[B or 1]`` twice.
        host_packed: The same on the host, two lists; None where the host must not be waited for (every row then packs
            the unit that left its window last: it is there already, or leaves now).
        rotation: ``positions [B or 1, E] -> cosine, sine [B or 1, E, D]``.
        is_interleaved: See `unrotate`.
    """

    def __init__(
        self, new: NewElements, chunk_size, units, packed, host_packed, rotation, is_interleaved=False, **window
    ) -> None:
        super().__init__(new, **window)
        self.chunk_size, self.units, self.rotation, self.is_interleaved = chunk_size, units, rotation, is_interleaved
        self.before, self.after = packed
        self.host_packed = host_packed
        if host_packed is None:
            self.num_new, real = 1, None
            self.unit = (self.after - 1).clamp(min=0)[:, None]
        else:
            self.num_new = max(after - before for before, after in zip(*host_packed, strict=True))
            self.unit = self.before[:, None] + torch.arange(self.num_new, device=self.index.device)
            real = None if self.index.shape[0] == 1 else self.unit < self.after[:, None]
        self.has_units = host_packed is None or max(host_packed[1]) > 0
        self.had_units = host_packed is not None and max(host_packed[0]) > 0
        if units is not None and self.num_new:
            if host_packed is not None:
                units.reserve(max(host_packed[1]))
            elements = NewElements(new.batch, self.unit, valid=real, rows=new.rows, backend=new.backend)
            self.unit_slots = elements.slot_mapping(units)

    @cached_property
    def content_rotation(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the segment's own queries."""
        return self.rotation(self.index)

    @cached_property
    def _tokens(self) -> torch.Tensor:
        """Tokens under the new units, ``[B or 1, U * S]``."""
        inside = torch.arange(self.chunk_size, device=self.index.device)
        return (self.unit[:, :, None] * self.chunk_size + inside).flatten(1)

    @cached_property
    def token_rotation(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.rotation(self._tokens)

    def attend(self, module, query, key, value, scale, softcap=None, sink_logits=None):
        layer, memory = module.layer_idx, module.memory
        if self._decodes(key):
            self.new.append(self.ring, layer, self.slot_mapping, key, value)
            found = self._decode_near(layer, query, scale, softcap)
            if self.num_new:
                self._pack_departed(module)
            if self.has_units:
                found = self._with_far(module, query, found, scale, softcap)
            return with_sink(found, sink_logits)[0]
        content = self._content(memory, query)
        past, latents = self._past(layer, query), self._pack(module, key, value)
        if latents is None:
            out = self._attend(query, key, value, scale, past, softcap=softcap, sink_logits=sink_logits)
        else:
            far = content, *memory.unpack(*latents)
            out = self._attend_by_cell(memory, query, key, value, scale, past, far, softcap, sink_logits)
        self._store(layer, key, value)
        return out

    def _attend_by_cell(
        self, memory: LayerMemory, query, key, value, scale, past, far, softcap, sink_logits
    ) -> torch.Tensor:
        """The layer's cells attend to what is near and far, its other heads to what is near."""
        if not memory.other_cells:
            return self._attend(query, key, value, scale, past, far, softcap, sink_logits)
        parts = []
        for cells, query_heads, seen in (
            (memory.cells, memory.query_heads, far),
            (memory.other_cells, memory.other_query_heads, None),
        ):
            states = (take_heads(query, query_heads), take_heads(key, cells), take_heads(value, cells))
            before = None if past is None else tuple(take_heads(each, cells) for each in past)
            sinks = None if sink_logits is None else take_heads(sink_logits[None], query_heads)[0]
            parts.append(self._attend(*states, scale, before, seen, softcap, sinks))
        order = (*memory.query_heads, *memory.other_query_heads)
        return take_heads_back(torch.cat(parts, dim=1), order)

    # --- packing ---

    def _pack(self, module, key, value) -> KeyValue | None:
        """Pack and store the units that leave the window in this segment; the latents of all units, or None."""
        layer, memory, new = module.layer_idx, module.memory, None
        # In training the modules run on nothing too: every parameter then has a gradient, on every process.
        # Of documents it depends on the process how long they are, and sharded modules are run by all or none.
        if self.num_new or (not self.had_units and (torch.is_grad_enabled() or self.new.varies)):
            keys, values = self._take(layer, *(take_heads(states, memory.cells) for states in (key, value)), memory)
            new, stored = memory.pack(unrotate(keys, self.token_rotation, self.is_interleaved), values)
            if self.units is not None and self.num_new:
                self.new.append(self.units, layer, self.unit_slots, *stored)
        if not self.had_units:
            return new
        count = max(self.host_packed[1])
        held = memory.load(self.units.read(layer, self.new.rows, count), key.dtype)
        if new is not None and torch.is_grad_enabled() and key.requires_grad:
            where = self.unit.expand(key.shape[0], -1)[:, None, :, None]
            held = tuple(old.scatter(2, where.expand_as(own), own) for old, own in zip(held, new, strict=True))
        return held

    def _take(self, layer: int, key: torch.Tensor, value: torch.Tensor, memory: LayerMemory) -> KeyValue:
        """The cells' keys and values of the tokens under the new units, ``[B, m, U * S, D]``."""
        if not self.new.has_past:
            stop = self.num_new * self.chunk_size
            return key[:, :, :stop], value[:, :, :stop]
        own = self.index[:, :1]
        slots = self.ring.capacity
        where = torch.where(
            self._tokens >= own, slots + (self._tokens - own).clamp(max=self.length - 1), self.ring.slot(self._tokens)
        )
        past = (take_heads(states, memory.cells) for states in self.ring.read(layer, self.new.rows))
        return tuple(_gather(torch.cat(pair, dim=2), where) for pair in zip(past, (key, value), strict=True))

    # --- decoding ---

    def _content(self, memory: LayerMemory, query: torch.Tensor) -> torch.Tensor:
        """The queries that read far with their rotation undone, ``[B, H, T, D]``."""
        return unrotate(take_heads(query, memory.query_heads), self.content_rotation, self.is_interleaved)

    def _with_far(self, module, query, near: KeyValue, scale: float, softcap: float | None) -> KeyValue:
        """Let the cells' query heads attend to the latents too.

        Args:
            near: Output ``[B, Hq, 1, D]`` and log-sum-exp ``[B, Hq, 1]`` over the ring, of all heads.

        Returns:
            The same over all keys.
        """
        layer, memory = module.layer_idx, module.memory
        if self.new.backend == "triton":
            *stored, block_table = self.units.operands(layer)
            settings = {"rows": self.new.kernel_rows, "block_table": block_table, "first_token": self.num_sinks}
            return memory.attend_stored(
                query, self.content_rotation, self.is_interleaved, stored, self.after, near, scale, **settings
            )
        stored = self.units.read(layer, self.new.rows, max(self.host_packed[1]) if self.host_packed else None)
        token = torch.arange(stored[0].shape[2] * self.chunk_size, device=query.device)
        visible = (token // self.chunk_size < self.after[:, None]) & (token >= self.num_sinks)
        content = self._content(memory, query)[:, :, 0]
        far = memory.attend_folded(content, stored, visible.expand(self.new.batch, -1), scale, softcap)
        reading = memory.query_heads
        joined = merge(tuple(take_heads(part, reading) for part in near), far)
        return tuple(put_heads(part, reading, new) for part, new in zip(near, joined, strict=True))

    @cached_property
    def _departed(self) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Rows of the pass whose unit leaves the window now (None: all), and its tokens' slots, ``[n or 1, S]``."""
        slots = self.ring.slot(self._tokens)
        if self.host_packed is None or self.index.shape[0] == 1:
            return None, slots
        rows = [row for row, (had, has) in enumerate(zip(*self.host_packed, strict=True)) if has > had]
        which = torch.tensor(rows, device=slots.device)
        return which, slots[which]

    @cached_property
    def _departed_rotation(self) -> tuple[torch.Tensor, torch.Tensor]:
        which, rotary = self._departed[0], self.token_rotation
        return rotary if which is None else tuple(part[which] if part.shape[0] > 1 else part for part in rotary)

    @cached_property
    def _departed_places(self) -> dict[str, torch.Tensor]:
        """Rows, slots and units of `unit_pack`."""
        which, slots = self._departed
        rows, units = self.new.kernel_rows, self.unit[:, 0].expand(self.new.batch)
        if which is not None:
            rows, units = rows[which], units[which]
        return {"rows": rows, "slots": slots.expand(len(rows), -1), "units": units}

    def _pack_departed(self, module) -> None:
        """Pack the unit that leaves the window with this token: it lies in the ring."""
        layer, memory, (which, slots) = module.layer_idx, module.memory, self._departed
        keys, values, _ = self.ring.operands(layer)
        if self.new.backend == "triton":
            *targets, block_table = self.units.operands(layer)
            memory.pack_stored(
                (keys, values),
                self._departed_rotation,
                self.is_interleaved,
                targets,
                block_table=block_table,
                **self._departed_places,
            )
            return
        rows = self.new.rows if which is None else (which if self.new.rows is None else self.new.rows[which])
        if rows is None:
            taken = tuple(_gather(states, slots) for states in (keys, values))
        else:
            taken = tuple(states[rows[:, None], :, slots].transpose(1, 2) for states in (keys, values))
        taken = tuple(take_heads(states, memory.cells) for states in taken)
        _, stored = memory.pack(unrotate(taken[0], self._departed_rotation, self.is_interleaved), taken[1])
        slot_mapping = self.unit_slots
        if which is not None:
            batch = torch.arange(len(which), device=which.device)
            slot_mapping = SlotMapping(rows, torch.zeros_like(batch), self.unit[which, 0], batch)
        self.new.append(self.units, layer, slot_mapping, *stored)

    # --- the plan of `blockwise_attention` ---

    @cached_property
    def _seen(self) -> list[tuple[int, int]]:
        """Per block, the far tokens that each of its queries sees, and those that one of them sees."""
        # What is no token stands after a row's last one, where nothing is packed yet.
        seen = self.start.clamp(min=0, max=max(self.host_packed[1]) * self.chunk_size).cpu()
        ends = [min(self.length, begin + self.block) - 1 for begin in range(0, self.length, self.block)]
        return [
            (int(seen[:, begin].min()), int(seen[:, end].max()))
            for begin, end in zip(range(0, self.length, self.block), ends, strict=True)
        ]

    def far(self, queries: slice, like: torch.Tensor) -> Iterator[FarKeys]:
        whole, some = self._seen[queries.start // self.block]
        whole = max(whole, self.num_sinks)
        most = max(MOST_SCORES // self.block, 1)
        for begin in range(self.num_sinks, whole, most):
            yield FarKeys(slice(begin, min(begin + most, whole)), None)
        if some > whole:
            yield FarKeys(slice(whole, some), self._far_bias(queries, whole, some, like.dtype))

    def _far_bias(self, queries: slice, whole: int, some: int, dtype: torch.dtype) -> torch.Tensor:
        name = ("far", queries.start, dtype)
        if name not in self._biases:
            token = torch.arange(whole, some, device=self.start.device)
            visible = token < self.start[:, queries, None]
            self._biases[name] = additive(visible, dtype)[:, None]
        return self._biases[name]

    def _attend_fused(self, query, key, value, scale, far) -> torch.Tensor:
        if far is None or not self.num_new:
            return super()._attend_fused(query, key, value, scale, None)
        return attend_window(query, key, value, self._far_mask, scale, far)

    @cached_property
    def _far_mask(self) -> FlexMask:
        """Of all layers, with the tokens under the units; without a past those are the new ones."""
        ends = far_ends(self.num_new, self.chunk_size, self.num_sinks, self.index.device)
        return window_mask(self.start[0], self.index[0], self.num_sinks, ends)


def _gather(states: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    """``states [B, H, N, D]`` at ``where [B or 1, E]``."""
    if where.shape[0] == 1:
        return states.index_select(2, where[0])
    return states.gather(2, where[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3]))
