"""Attention of PHOTON models: one segment of new tokens per row, over what the cache holds of earlier ones.

The families' attention layers call `photon_attention` through transformers' attention interface; a list of *segments*,
one per layer, handed down as a keyword argument says which keys each query sees. The same segments serve training (no
cache), prefill (many tokens after a past) and decoding (one token). At one token per row the backend `triton` replaces
the operations by kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from .cache_photon import GrowingStore, KeyValue, Placement, RingStore
from .flex_photon import attend_window, is_usable
from .memory_photon import LayerMemory
from .softmax_photon import FarKeys, NearKeys, additive, attend_set, blockwise_attention, merge

ATTENTION_NAME = "photon"
BACKENDS = ("torch", "triton")
# How windows are attended to in training on a GPU: by one compiled kernel (`flex_photon`), block by block, or the first
# where it has been found to work.
FUSED = ("auto", "yes", "no")
BLOCK = 128  # queries of a block, about: a window's keys are read once for them all
FULL_BLOCK = 256


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


def photon_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    photon_segments: list[Segment] | None = None,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """Entry of transformers' attention interface: hand the layer's queries and keys to its segment.

    Args:
        query: ``[B, Hq, T, D]``, rotated; key, value: ``[B, Hkv, T, D]``.

    Returns:
        ``([B, T, Hq, D], None)``.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    # Under autocast the rotation leaves queries and keys in fp32 while values are bf16.
    query, key = query.to(value.dtype), key.to(value.dtype)
    out = photon_segments[module.layer_idx].attend(module, query, key, value, scale)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION_NAME, photon_attention)


def sdpa(query, key, value, scale: float, mask: torch.Tensor | None = None, causal: bool = False) -> torch.Tensor:
    """`F.scaled_dot_product_attention` with grouped-query heads: ``[B, Hq, T, D]`` against ``[B, Hkv, K, D]``."""
    groups = query.shape[1] // key.shape[1]
    if mask is not None and groups > 1 and query.is_cuda:
        # With a mask and grouped heads no fused CUDA kernel is chosen, and all scores would be held.
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped
    )


def unrotate(states: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Undo the rotation of queries or keys ``[B, H, E, D]``; norms stay.

    Args:
        rotary: Cosine and sine, ``[B or 1, E, D]`` each; of fewer dimensions than D where heads are rotated in part.
    """
    cosine, sine = (part.unsqueeze(1) for part in rotary)
    size = cosine.shape[-1]
    turned, rest = states[..., :size], states[..., size:]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cosine - torch.cat([-second, first], dim=-1) * sine
    return torch.cat([turned, rest], dim=-1).to(states.dtype) if rest.shape[-1] else turned.to(states.dtype)


class NewElements:
    """The new elements of a pass, consecutive in every row's sequence, and where they go.

    Args:
        batch: B, rows of the pass.
        index: Sequence index of each new element, ``[B, T]``, or ``[1, T]`` where all rows agree (which is cheaper).
        base: The first index of all rows on the host, where they agree; else None.
        valid: Which elements are real, ``[B, T]``; None: all. The others follow them.
        rows: Rows of the cache, ``[B]``; None: all, in order.
        has_past: Whether any row has elements in the cache.
        backend: `torch` or `triton` (used at one element per row).
    """

    def __init__(
        self,
        batch: int,
        index: torch.Tensor,
        base: int | None = None,
        valid: torch.Tensor | None = None,
        rows: torch.Tensor | None = None,
        has_past: bool = False,
        backend: str = "torch",
    ) -> None:
        self.batch, self.index, self.base, self.valid, self.rows = batch, index, base, valid, rows
        self.has_past, self.backend = has_past, backend
        self._rings: dict[int, tuple[torch.Tensor, Placement]] = {}

    @property
    def length(self) -> int:
        """T."""
        return self.index.shape[1]

    @property
    def kernel_rows(self) -> torch.Tensor:
        """Rows of the cache, ``[B]``, for kernels."""
        return torch.arange(self.batch, device=self.index.device) if self.rows is None else self.rows

    def placement(self, store: RingStore | GrowingStore) -> Placement:
        """Where the new elements go; of more than a ring holds, the last ones and the sinks."""
        keep = torch.ones_like(self.index, dtype=torch.bool) if self.valid is None else self.valid
        slots = self.index
        if isinstance(store, RingStore):
            slots = store.slot(self.index)
            last = self.index[:, -1:] if self.valid is None else self.index[:, :1] + self.valid.sum(1, True) - 1
            keep = keep & ((self.index > last - store.ring_size) | (self.index < store.num_sinks))
        if self.length == 1 and self.valid is None and (keep.shape[0] > 1 or self.backend == "triton"):
            batch = torch.arange(self.batch, device=keep.device)
            return Placement(self.rows, torch.zeros_like(batch), slots[:, 0].expand(self.batch), batch)
        if keep.shape[0] == 1:
            columns = torch.arange(self.length, device=self.index.device)
            if self.length > 1:
                columns = columns[keep[0]]
            return Placement(self.rows, columns, slots[0, columns])
        batch, columns = keep.nonzero(as_tuple=True)
        return Placement(self.rows, columns, slots.expand(keep.shape)[batch, columns], batch)

    def enter(self, ring: RingStore) -> tuple[torch.Tensor, Placement]:
        """Let `ring` know of the new elements, once for all its layers: what it held before, and their places."""
        if id(ring) not in self._rings:
            held, placement = ring.read_index(self.rows), self.placement(ring)
            placement.put(ring.index, self.index.expand(self.batch, -1))
            self._rings[id(ring)] = held[:1] if self.index.shape[0] == 1 else held, placement
        return self._rings[id(ring)]

    def append(self, store: RingStore | GrowingStore, layer: int, placement: Placement, key, value) -> None:
        """Store keys and values ``[B, Hkv, T, D]``, at one element per row by the backend."""
        if self.backend != "triton" or placement.batch is None:
            store.write(layer, placement, key, value)
            return
        kernels = load_kernels()
        *stored, pages = store.operands(layer)
        entries = placement.slots[:, None]
        appends = [
            kernels.Append(new[placement.batch, :, placement.columns, None], to, placement.cache_rows, entries, pages)
            for new, to in zip((key, value), stored, strict=True)
        ]
        kernels.cache_append(appends, backend="triton")


class Segment:
    """What a layer's attention does with the new elements of a pass."""

    def __init__(self, new: NewElements) -> None:
        self.new, self.index, self.length = new, new.index, new.length

    def attend(self, module, query, key, value, scale) -> torch.Tensor:
        """Attend with ``query [B, Hq, T, D]`` to the new ``key, value [B, Hkv, T, D]`` and the cache; store them.

        Args:
            module: The layer's attention module; its ``layer_idx`` is the layer.

        Returns:
            ``[B, Hq, T, D]``.
        """
        raise NotImplementedError


class FullSegment(Segment):
    """Causal attention to everything before.

    Args:
        store: Holds the past; None: there is none, and nothing is kept.
        count: Elements of the longest row once this segment is stored, on the host.
    """

    def __init__(self, new: NewElements, store: GrowingStore | None = None, count: int = 0) -> None:
        super().__init__(new)
        self.store, self.count = store, count
        if store is not None:
            store.reserve(count)
            self.placement = new.placement(store)

    def attend(self, module, query, key, value, scale):
        if self.store is not None:
            self.new.append(self.store, module.layer_idx, self.placement, key, value)
        if not self.new.has_past:
            return sdpa(query, key, value, scale, causal=True)
        if self.new.backend == "triton" and self.length == 1:
            keys, values, pages = self.store.operands(module.layer_idx)
            seen = (self.index + 1).expand(self.new.batch, -1)
            return load_kernels().paged_decode_attention(
                query, keys, values, seen, scale, rows=self.new.kernel_rows, pages=pages, backend="triton"
            )
        keys, values = self.store.read(module.layer_idx, self.new.rows, self.count)
        if self.index.shape[0] == 1 and self.length == 1 and keys.shape[2] == self.count:
            return sdpa(query, keys, values, scale)
        if torch.is_grad_enabled() and key.requires_grad:
            keys, values = (self._with_own(*pair) for pair in ((keys, key), (values, value)))
        slot, pieces = torch.arange(keys.shape[2], device=keys.device), []
        for rows in torch.arange(self.length).split(FULL_BLOCK):
            rows = slice(int(rows[0]), int(rows[-1]) + 1)
            mask = (slot <= self.index[:, rows, None])[:, None]
            pieces.append(sdpa(query[:, :, rows], keys, values, scale, mask=mask))
        return torch.cat(pieces, dim=2)

    def _with_own(self, stored: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        """What was read, with the segment's own states in place, so that gradients reach them."""
        where = self.index.expand(own.shape[0], -1)[:, None, :, None].expand_as(own)
        return stored.scatter(2, where, own.to(stored.dtype))


class WindowSegment(Segment):
    """Causal attention to a sliding window and a few sinks.

    Args:
        start: First element that each new one sees (sinks aside), ``[B or 1, T]`` as `index`; 0 or less: all.
        reach: The most that an element's index exceeds its start by.
        period: Elements after which the differences of index and start repeat.
        num_sinks: First elements that stay visible.
        ring: Holds the past; None: there is none, and nothing is kept.
        fused: See `FUSED`.
    """

    def __init__(
        self,
        new: NewElements,
        start: torch.Tensor,
        reach: int,
        period: int = 1,
        num_sinks: int = 0,
        ring: RingStore | None = None,
        fused: str = "auto",
    ) -> None:
        super().__init__(new)
        self.start, self.reach, self.num_sinks, self.ring, self.fused = start, reach, num_sinks, ring, fused
        self.period, self.block = period, -(-BLOCK // period) * period
        self._biases: dict[object, torch.Tensor] = {}
        self.past_index, self.placement = (None, None) if ring is None else new.enter(ring)

    def attend(self, module, query, key, value, scale):
        return self._attend(module, query, key, value, scale)

    def _attend(self, module, query, key, value, scale, far: Callable | None = None) -> torch.Tensor:
        layer = module.layer_idx
        if self._decodes():
            self.new.append(self.ring, layer, self.placement, key, value)
            near = self._decode_near(layer, query, scale)
            return (near if far is None else merge(near, far()))[0]
        if self._is_fused(query, key, 1 if far is None else 2):
            out = self._attend_fused(query, key, value, scale, None if far is None else far())
        else:
            past = self.ring.read(layer, self.new.rows) if self.new.has_past else None
            out = blockwise_attention(self, scale, query, key, value, past, None if far is None else far())
        if self.ring is not None:
            self.ring.write(layer, self.placement, key, value)
        return out

    def _decodes(self) -> bool:
        """Whether this is one element per row: it is stored first, and read with what the ring holds."""
        return self.length == 1 and self.ring is not None and self.new.has_past

    def _decode_near(self, layer: int, query: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        if self.new.backend == "triton":
            keys, values, _ = self.ring.operands(layer)
            index, start = (each.expand(self.new.batch, -1) for each in (self.index, self.start))
            return load_kernels().window_decode_attention(
                query,
                keys,
                values,
                self.ring.index,
                start[:, 0],
                index,
                scale,
                num_sinks=self.num_sinks,
                rows=self.new.kernel_rows,
                return_lse=True,
                backend="triton",
            )
        keys, values = self.ring.read(layer, self.new.rows)
        return attend_set(query, keys, values, self._decode_bias(query.dtype), scale)

    def _decode_bias(self, dtype: torch.dtype) -> torch.Tensor:
        if "decode" not in self._biases:
            held = self.ring.read_index(self.new.rows)
            held = held[:1] if self.index.shape[0] == 1 else held
            self._biases["decode"] = additive(self._visible(held, slice(0, 1)), dtype)[:, None]
        return self._biases["decode"]

    def _visible(self, held: torch.Tensor, queries: slice) -> torch.Tensor:
        """Which of the elements ``held [B or 1, K]`` the queries see, ``[B or 1, R, K]``."""
        index, start = self.index[:, queries, None], self.start[:, queries, None]
        held = held[:, None]
        near = (held >= start) | (held < self.num_sinks)
        return (held >= 0) & (held <= index) & near

    # --- the plan of `blockwise_attention` ---

    def near(self, like: torch.Tensor) -> Iterator[NearKeys]:
        past = self.past_index.shape[1] if self.new.has_past else 0
        for begin in range(0, self.length, self.block):
            queries = slice(begin, min(self.length, begin + self.block))
            first, sinks, slots = begin - self.reach, self.num_sinks, min(self.num_sinks, past)
            if first <= self.num_sinks:
                first, sinks, slots = 0, 0, past
            yield NearKeys(queries, slots, sinks, first, self._bias(queries, slots, sinks, first, like.dtype))

    def _bias(self, queries: slice, slots: int, sinks: int, first: int, dtype: torch.dtype) -> torch.Tensor:
        # Away from the segment's beginning the mask repeats.
        size = queries.stop - queries.start
        name = (dtype, size, "inside") if first and self.new.base is not None else (dtype, queries.start)
        if name not in self._biases:
            held = [self.past_index[:, :slots]] if slots else []
            held += [self.index[:, :sinks], self.index[:, first : queries.stop]]
            self._biases[name] = additive(self._visible(torch.cat(held, dim=1), queries), dtype)[:, None]
        return self._biases[name]

    def far(self, queries: slice, like: torch.Tensor) -> Iterator[FarKeys]:
        yield from ()

    # --- training on a GPU ---

    def _is_fused(self, query: torch.Tensor, key: torch.Tensor, widths: int) -> bool:
        if self.fused == "no" or self.new.has_past or self.index.shape[0] != 1:
            return False
        # Training has one length; evaluation would compile for each.
        trains = query.is_cuda and torch.is_grad_enabled() and query.requires_grad
        return self.fused == "yes" or (
            trains and is_usable(query.device, query.dtype, query.shape[1], key.shape[1], widths * query.shape[3])
        )

    def _attend_fused(self, query, key, value, scale, far) -> torch.Tensor:
        return attend_window(query, key, value, self.start[0], self.index[0], self.num_sinks, scale)


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
    """

    def __init__(self, new: NewElements, chunk_size, units, packed, host_packed, rotation, **window) -> None:
        super().__init__(new, **window)
        self.chunk_size, self.units, self.rotation = chunk_size, units, rotation
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
        self.held_before = host_packed is not None and max(host_packed[0]) > 0
        if units is not None and self.num_new:
            if host_packed is not None:
                units.reserve(max(host_packed[1]))
            elements = NewElements(new.batch, self.unit, valid=real, rows=new.rows, backend=new.backend)
            self.unit_placement = elements.placement(units)

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

    def attend(self, module, query, key, value, scale):
        memory: LayerMemory = module.memory
        content = unrotate(query, self.content_rotation)
        if self._decodes():
            return self._attend(module, query, key, value, scale, lambda: self._decode_far(module, content, scale))
        latents = self._pack(module, key, value)
        if latents is None:
            return self._attend(module, query, key, value, scale)
        keys, values = memory.unpack(*latents)
        return self._attend(module, query, key, value, scale, lambda: (content, keys, values))

    # --- packing ---

    def _pack(self, module, key, value) -> KeyValue | None:
        """Pack and store the units that leave the window in this segment; the latents of all units, or None."""
        layer, new = module.layer_idx, None
        # In training the modules run on nothing too: every parameter then has a gradient, on every process.
        if self.num_new or (torch.is_grad_enabled() and not self.held_before):
            keys, values = self._take(layer, key, value)
            new = module.memory.pack(unrotate(keys, self.token_rotation), values)
            if self.units is not None and self.num_new:
                self.new.append(self.units, layer, self.unit_placement, *new)
        if not self.held_before:
            return new
        count = max(self.host_packed[1])
        held = self.units.read(layer, self.new.rows, count)
        if new is not None and torch.is_grad_enabled() and key.requires_grad:
            where = self.unit.expand(key.shape[0], -1)[:, None, :, None]
            held = tuple(old.scatter(2, where.expand_as(own), own) for old, own in zip(held, new, strict=True))
        return held

    def _take(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> KeyValue:
        """Keys and values of the tokens under the new units, ``[B, Hkv, U * S, D]``."""
        if not self.new.has_past:
            stop = self.num_new * self.chunk_size
            return key[:, :, :stop], value[:, :, :stop]
        own = self.index[:, :1]
        slots = self.ring.capacity
        where = torch.where(
            self._tokens >= own, slots + (self._tokens - own).clamp(max=self.length - 1), self.ring.slot(self._tokens)
        )
        past = self.ring.read(layer, self.new.rows)
        return tuple(_gather(torch.cat(pair, dim=2), where) for pair in zip(past, (key, value), strict=True))

    # --- decoding ---

    def _decode_far(self, module, content: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        layer, memory = module.layer_idx, module.memory
        if self.num_new:
            self._pack_departed(module)
        if not self.has_units:
            return torch.zeros_like(content), content.new_full(content.shape[:3], -torch.inf, dtype=torch.float32)
        if self.new.backend == "triton":
            kernels = load_kernels()
            keys, values, pages = self.units.operands(layer)
            mixed, mass, lse = kernels.latent_decode(
                *memory.fold_queries(content[:, :, 0]),
                keys,
                values,
                self.after.expand(self.new.batch),
                scale,
                first_token=self.num_sinks,
                rows=self.new.kernel_rows,
                pages=pages,
                backend="triton",
            )
            return memory.unfold_values(mixed, mass)[:, :, None].to(content.dtype), lse[..., None]
        latents = self.units.read(layer, self.new.rows, max(self.host_packed[1]) if self.host_packed else None)
        token = torch.arange(latents[0].shape[2] * self.chunk_size, device=content.device)
        visible = (token // self.chunk_size < self.after[:, None]) & (token >= self.num_sinks)
        return memory.attend_folded(content[:, :, 0], latents, visible.expand(self.new.batch, -1), scale)

    @cached_property
    def _departed(self) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Rows of the pass whose unit leaves the window now (None: all), and its tokens' slots, ``[n or 1, S]``."""
        slots = self.ring.slot(self._tokens)
        if self.host_packed is None or self.index.shape[0] == 1:
            return None, slots
        rows = [row for row, (had, has) in enumerate(zip(*self.host_packed, strict=True)) if has > had]
        which = torch.tensor(rows, device=slots.device)
        return which, slots[which]

    def _pack_departed(self, module) -> None:
        """Pack the unit that leaves the window with this token: it lies in the ring."""
        layer, (which, slots) = module.layer_idx, self._departed
        keys, values, _ = self.ring.operands(layer)
        rows = self.new.rows if which is None else (which if self.new.rows is None else self.new.rows[which])
        if rows is None:
            taken = tuple(_gather(states, slots) for states in (keys, values))
        else:
            taken = tuple(states[rows[:, None], :, slots].transpose(1, 2) for states in (keys, values))
        rotary = self.token_rotation
        if which is not None:
            rotary = tuple(part[which] if part.shape[0] > 1 else part for part in rotary)
        new = module.memory.pack(unrotate(taken[0], rotary), taken[1])
        placement = self.unit_placement
        if which is not None:
            batch = torch.arange(len(which), device=which.device)
            placement = Placement(rows, torch.zeros_like(batch), self.unit[which, 0], batch)
        self.new.append(self.units, layer, placement, *new)

    # --- the plan of `blockwise_attention` ---

    @cached_property
    def _seen(self) -> list[tuple[int, int]]:
        """Per block, the far tokens that each of its queries sees, and those that one of them sees."""
        seen = self.start.clamp(min=0).cpu()
        ends = [min(self.length, begin + self.block) - 1 for begin in range(0, self.length, self.block)]
        return [
            (int(seen[:, begin].min()), int(seen[:, end].max()))
            for begin, end in zip(range(0, self.length, self.block), ends, strict=True)
        ]

    def far(self, queries: slice, like: torch.Tensor) -> Iterator[FarKeys]:
        whole, some = self._seen[queries.start // self.block]
        whole = max(whole, self.num_sinks)
        if whole > self.num_sinks:
            yield FarKeys(slice(self.num_sinks, whole), None)
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
        return attend_window(
            query, key, value, self.start[0], self.index[0], self.num_sinks, scale, far, self.chunk_size
        )


def _gather(states: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    """``states [B, H, N, D]`` at ``where [B or 1, E]``."""
    if where.shape[0] == 1:
        return states.index_select(2, where[0])
    return states.gather(2, where[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3]))
