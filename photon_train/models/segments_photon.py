"""Segments without a memory: causal attention to everything before, or to a sliding window and a few sinks."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import torch

from .attention_photon import NewElements, load_kernels, sdpa
from .flex_photon import FlexMask, attend_window, is_usable, window_mask
from .softmax_photon import FarKeys, NearKeys, additive, attend_set, blockwise_attention, with_sink
from .stores_photon import GrowingStore, KeyValue, RingStore

# How windows are attended to in training on a GPU: by one compiled kernel (`flex_photon`), block by block, or the first
# where it has been found to work.
FUSED = ("auto", "yes", "no")
# Queries of a block, about: a window's keys are read once for them all. A GPU that only reads waits for launches, and
# not for the products that wider blocks have more of.
BLOCK, GPU_BLOCK = 128, 1024
FULL_BLOCK = 256
MOST_SCORES = 2**23  # of a block and a set of far keys, per head: more keys are several sets


def block_of(states: torch.Tensor) -> int:
    """Queries that are attended with at a time where `states` are."""
    return GPU_BLOCK if states.is_cuda and not torch.is_grad_enabled() else BLOCK


class FullSegment:
    """Causal attention to everything before.

    Args:
        store: Holds the past; None: there is none, and nothing is kept.
        count: Elements of the longest row once this segment is stored, on the host; None: the store knows.
    """

    def __init__(self, new: NewElements, store: GrowingStore | None = None, count: int | None = 0) -> None:
        self.new, self.index, self.length = new, new.index, new.length
        self.store, self.count = store, count
        if store is not None:
            store.reserve(count)
            self.slot_mapping = new.slot_mapping(store)

    def attend(self, module, query, key, value, scale, softcap=None, sink_logits=None):
        is_plain = softcap is None and sink_logits is None
        if self.store is not None:
            self.new.append(self.store, module.layer_idx, self.slot_mapping, key, value)
        if not self.new.has_past:
            if not is_plain:
                return self._whole.attend(module, query, key, value, scale, softcap, sink_logits)
            return sdpa(query, key, value, scale, causal=True)
        if self.new.backend == "triton" and self.length == 1:
            keys, values, block_table = self.store.operands(module.layer_idx)
            seen = (self.index + 1).expand(self.new.batch, -1)
            settings = {"rows": self.new.kernel_rows, "block_table": block_table, "backend": "triton"}
            if sink_logits is None:
                return load_kernels().paged_decode_attention(query, keys, values, seen, scale, **settings)
            found = load_kernels().paged_decode_attention(query, keys, values, seen, scale, return_lse=True, **settings)
            return with_sink(found, sink_logits)[0]
        keys, values = self.store.read(module.layer_idx, self.new.rows, self.count)
        if torch.is_grad_enabled() and key.requires_grad:
            keys, values = (self._with_own(*pair) for pair in ((keys, key), (values, value)))
        if self.index.shape[0] == 1 and self.length == 1 and keys.shape[2] == self.count and is_plain:
            return sdpa(query, keys, values, scale)
        slot, pieces = torch.arange(keys.shape[2], device=keys.device), []
        for rows in torch.arange(self.length).split(max(FULL_BLOCK, block_of(query))):
            rows = slice(int(rows[0]), int(rows[-1]) + 1)
            mask = (slot <= self.index[:, rows, None])[:, None]
            if is_plain:
                pieces.append(sdpa(query[:, :, rows], keys, values, scale, mask=mask))
            else:
                bias = additive(mask, query.dtype)
                found = attend_set(query[:, :, rows], keys, values, bias, scale, softcap=softcap)
                pieces.append(with_sink(found, sink_logits)[0])
        return torch.cat(pieces, dim=2)

    @cached_property
    def _whole(self) -> WindowSegment:
        """A window over the whole sequence: what has a softcap or sink logits is computed block by block."""
        return WindowSegment(self.new, torch.zeros_like(self.index), self.length, fused="no")

    def _with_own(self, stored: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        """What was read, with the segment's own states in place, so that gradients reach them."""
        where = self.index.expand(own.shape[0], -1)[:, None, :, None].expand_as(own)
        return stored.scatter(2, where, own.to(stored.dtype))


class WindowSegment:
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
        self.new, self.index, self.length = new, new.index, new.length
        self.start, self.reach, self.num_sinks, self.ring, self.fused = start, reach, num_sinks, ring, fused
        self.period, self.block = period, -(-block_of(self.index) // period) * period
        self._biases: dict[object, torch.Tensor] = {}
        self.past_index, self.slot_mapping = (None, None) if ring is None else new.enter(ring)

    def attend(self, module, query, key, value, scale, softcap=None, sink_logits=None):
        layer = module.layer_idx
        if self._decodes(key):
            self.new.append(self.ring, layer, self.slot_mapping, key, value)
            return with_sink(self._decode_near(layer, query, scale, softcap), sink_logits)[0]
        past = self._past(layer, query)
        out = self._attend(query, key, value, scale, past, softcap=softcap, sink_logits=sink_logits)
        self._store(layer, key, value)
        return out

    def _attend(
        self, query, key, value, scale, past: KeyValue | None, far: tuple | None = None, softcap=None, sink_logits=None
    ) -> torch.Tensor:
        """Attend to the segment's own keys, the ring's (`past`) and `far` ones (see `blockwise_attention`)."""
        if softcap is None and sink_logits is None and self._is_fused(query, key, 1 if far is None else 2):
            return self._attend_fused(query, key, value, scale, far)
        return blockwise_attention(self, scale, query, key, value, past, far, softcap, sink_logits)

    def _past(self, layer: int, query: torch.Tensor) -> KeyValue | None:
        if not self.new.has_past:
            return None
        past = self.ring.read(layer, self.new.rows)
        if torch.is_grad_enabled() and query.requires_grad:
            past = tuple(states.clone() for states in past)  # what is stored now must not reach the backward pass
        return past

    def _store(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        if self.ring is not None:
            self.ring.write(layer, self.slot_mapping, key, value)

    def _decodes(self, key: torch.Tensor) -> bool:
        """Whether this is one element per row: it is stored first, and read with what the ring holds.

        Gradients do not pass through the ring: where they are asked for, one element is a short segment.
        """
        differentiates = torch.is_grad_enabled() and key.requires_grad
        return self.length == 1 and self.ring is not None and self.new.has_past and not differentiates

    def _decode_near(
        self, layer: int, query: torch.Tensor, scale: float, softcap: float | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
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
        return attend_set(query, keys, values, self._decode_bias(query.dtype), scale, softcap=softcap)

    def _decode_bias(self, dtype: torch.dtype) -> torch.Tensor:
        if "decode" not in self._biases:
            key_index = self.ring.read_index(self.new.rows)
            key_index = key_index[:1] if self.index.shape[0] == 1 else key_index
            self._biases["decode"] = additive(self._visible(key_index, slice(0, 1)), dtype)[:, None]
        return self._biases["decode"]

    def _visible(self, key_index: torch.Tensor, queries: slice) -> torch.Tensor:
        """Which keys, of elements ``key_index [B or 1, K]``, the queries see, ``[B or 1, R, K]``."""
        index, start = self.index[:, queries, None], self.start[:, queries, None]
        key_index = key_index[:, None]
        near = (key_index >= start) | (key_index < self.num_sinks)
        return (key_index >= 0) & (key_index <= index) & near

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
            key_index = [self.past_index[:, :slots]] if slots else []
            key_index += [self.index[:, :sinks], self.index[:, first : queries.stop]]
            self._biases[name] = additive(self._visible(torch.cat(key_index, dim=1), queries), dtype)[:, None]
        return self._biases[name]

    def far(self, queries: slice, like: torch.Tensor) -> Iterator[FarKeys]:
        yield from ()

    # --- training on a GPU ---

    def _is_fused(self, query: torch.Tensor, key: torch.Tensor, widths: int) -> bool:
        if self.fused == "no" or self.new.has_past or self.index.shape[0] != 1:
            return False
        # Compiling takes up to minutes, which a training is worth.
        trains = query.is_cuda and torch.is_grad_enabled() and query.requires_grad
        return self.fused == "yes" or (
            trains and is_usable(query.device, query.dtype, query.shape[1] // key.shape[1], widths * query.shape[3])
        )

    def _attend_fused(self, query, key, value, scale, far) -> torch.Tensor:
        return attend_window(query, key, value, self._near_mask, scale)

    @cached_property
    def _near_mask(self) -> FlexMask:
        """Of all layers."""
        return window_mask(self.start[0], self.index[0], self.num_sinks)
