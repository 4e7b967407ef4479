"""Attention of PHOTON stacks over whole sequences: full causal, or a band whose cost is linear in its length.

The families' attention layers call `photon_attention` through transformers' attention interface; a *span* handed
down as a keyword argument says which keys each query sees. Spans for one-token decoding are in `decoding_photon`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface

from .flex_photon import FlexMask, attend_fused, band_mask, compiled, flex_attention, works

ATTENTION_NAME = "photon"
KeyValue = tuple[torch.Tensor, torch.Tensor]
# How bands are attended to: by one fused kernel (`flex_photon`; its gradients need a GPU), block by block in SDPA, or
# the first where gradients are computed on a GPU and the kernel has been found to work there.
FUSED = ("auto", "yes", "no")
# Queries that a band takes at a time: enough to fill a GPU.
PIECE = 2048


class Span(Protocol):
    """Which keys each query of a layer sees, and where they come from."""

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        dropout: float,
        sliding_window: int | None,
    ) -> torch.Tensor:
        """Attend with ``query [B, Hq, E, D]`` to ``key, value [B, Hkv, E, D]``; returns ``[B, Hq, E, D]``."""


def photon_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    photon_span: Span | None = None,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """Entry of transformers' attention interface: hand the layer's queries and keys to its span.

    Args:
        query: ``[B, Hq, E, D]``, rotated; key, value: ``[B, Hkv, E, D]``.
        sliding_window: The family's own window (Mistral, Qwen2), or None.

    Returns:
        ``([B, E, Hq, D], None)``.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    # Under autocast the rotation leaves queries and keys in fp32 while values are bf16.
    query, key = query.to(value.dtype), key.to(value.dtype)
    out = photon_span.attend(module.layer_idx, query, key, value, scale, dropout, sliding_window)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION_NAME, photon_attention)


def sdpa(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    mask: torch.Tensor | None = None,
    causal: bool = False,
    dropout: float = 0.0,
) -> torch.Tensor:
    """`F.scaled_dot_product_attention` with grouped-query heads: ``[B, Hq, E, D]`` against ``[B, Hkv, K, D]``."""
    groups = query.shape[1] // key.shape[1]
    if mask is not None and groups > 1 and query.is_cuda:
        # With a mask and grouped heads no fused CUDA kernel is chosen, and all scores would be held.
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=causal,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def window_start(position: torch.Tensor, window: int, alignment: int) -> torch.Tensor:
    """First token that a window of `window` tokens ending at `position` covers, moved back to a multiple.

    The unit that holds the oldest token of the window is then covered whole, so each
    earlier token is either in the window or under a visible unit (DESIGN 3.2).
    """
    return (position - window + 1).clamp(min=0) // alignment * alignment


def unit_log_count(num_units: int, span: int, num_sinks: int, device: torch.device) -> torch.Tensor:
    """Log of the tokens that each unit's entry stands for, ``[num_units]``; sinks are counted beside the units."""
    sinks_inside = (num_sinks - torch.arange(num_units, device=device) * span).clamp(0, span)
    return torch.log((span - sinks_inside).float())


def in_blocks(states: torch.Tensor, block: int, fill: float = 0.0) -> torch.Tensor:
    """``[B, H, E, D]`` -> ``[B, H, blocks, block, D]``, padded with `fill`."""
    return F.pad(states, (0, 0, 0, -states.shape[2] % block), value=fill).unflatten(2, (-1, block))


def fold_blocks(blocks: torch.Tensor) -> torch.Tensor:
    """``[B, H, blocks, N, D]`` -> ``[B * blocks, H, N, D]``: each block by itself."""
    return blocks.transpose(1, 2).flatten(0, 1)


@dataclass
class FullSpan:
    """Causal attention over the whole sequence (also over each isolated chunk, folded into the batch)."""

    recorded: dict[int, KeyValue] | None = None

    def attend(self, layer, query, key, value, scale, dropout, sliding_window):
        if self.recorded is not None:
            self.recorded[layer] = (key, value)
        length = query.shape[2]
        if sliding_window is not None and length > sliding_window:
            positions = torch.arange(length, device=query.device)
            return BandSpan(positions, sliding_window, sliding_window).attend(
                layer, query, key, value, scale, dropout, None
            )
        return sdpa(query, key, value, scale, causal=True, dropout=dropout)


@dataclass
class BandSpan:
    """Causal attention over a sliding window and a few sinks, in blocks: cost and memory linear in the length.

    Attributes:
        positions: Token position of each of the E elements, ``[E]``, non-decreasing (slots share their chunk's first).
        window: Tokens a query sees, its own included.
        block: Elements per block; a window, moved back by `alignment`, must fit into a block and the one before it.
        alignment: See `window_start`.
        sinks: Indices of the elements that every later element sees, ``[s]``, or None.
        recorded: If given, receives every layer's keys and values.
        fused: See `FUSED`.
    """

    positions: torch.Tensor
    window: int
    block: int
    alignment: int = 1
    sinks: torch.Tensor | None = None
    recorded: dict[int, KeyValue] | None = None
    fused: str = "auto"

    @property
    def num_blocks(self) -> int:
        return max(1, math.ceil(self.positions.shape[0] / self.block))

    @cached_property
    def _index(self) -> torch.Tensor:
        """Element index of every query, ``[blocks, block]``; indices past the end are padding."""
        count = self.num_blocks * self.block
        return torch.arange(count, device=self.positions.device).view(self.num_blocks, self.block)

    @cached_property
    def _starts(self) -> torch.Tensor:
        """First visible token of every query, ``[blocks, block]``."""
        last = self.positions.shape[0] - 1
        return window_start(self.positions[self._index.clamp(max=last)], self.window, self.alignment)

    @cached_property
    def mask(self) -> torch.Tensor:
        """Visibility ``[blocks, block, 2 * block + s]``: the previous block, the own block, the sinks."""
        query, last = self._index, self.positions.shape[0] - 1
        key = torch.cat([query - self.block, query], dim=1)
        safe = key.clamp(0, last)
        near = self.positions[safe][:, None, :] >= self._starts[:, :, None]
        if self.sinks is not None:
            is_sink = torch.zeros(last + 1, dtype=torch.bool, device=query.device)
            is_sink[self.sinks] = True
            near = near | is_sink[safe][:, None, :]
        visible = near & (key[:, None, :] <= query[:, :, None]) & (key >= 0)[:, None, :]
        if self.sinks is not None:
            before = self.sinks[None, None, :] < key[:, :1, None]
            visible = torch.cat([visible, before.expand(-1, self.block, -1)], dim=2)
        return visible

    def attend(self, layer, query, key, value, scale, dropout, sliding_window):
        if self.recorded is not None:
            self.recorded[layer] = (key, value)
        return self._attend_pieces(query, key, value, scale, dropout)

    def _attend_pieces(self, query, key, value, scale, dropout, units: KeyValue | None = None):
        """Attend with one fused kernel, or piece by piece; the backward pass gathers a piece's keys and values again.

        So the layer keeps its queries, keys and values alone, and what is gathered for the blocks, the units of every
        block included, is held for one piece at a time.
        """
        if self._is_fused(query, key, dropout, query.shape[3]):
            function = compiled() if query.is_cuda else flex_attention
            mask = self._flex_mask(0 if units is None else units[0].shape[2])
            return attend_fused(query, key, value, mask, scale, units, function)
        per_piece = max(1, PIECE // self.block)
        queries, keys, values = (states.split(per_piece * self.block, dim=2) for states in (query, key, value))
        sinks = [None, None] if self.sinks is None else [key[:, :, self.sinks], value[:, :, self.sinks]]
        outputs = []
        for number, own in enumerate(zip(queries, keys, values, strict=True)):
            blocks = slice(number * per_piece, (number + 1) * per_piece)
            before = [side[number - 1][:, :, -self.block :] if number else None for side in (keys, values)]
            seen = [side[:, :, : self._num_visible(blocks)] for side in units] if units else [None, None]
            arguments = (blocks, *own, *before, *sinks, *seen, scale, dropout)
            if torch.is_grad_enabled() and query.requires_grad:
                output = checkpoint(self._attend_piece, *arguments, use_reentrant=False, preserve_rng_state=dropout > 0)
            else:
                output = self._attend_piece(*arguments)
            outputs.append(output)
        return torch.cat(outputs, dim=1).transpose(1, 2)

    def _is_fused(self, query: torch.Tensor, key: torch.Tensor, dropout: float, head_dim: int) -> bool:
        if self.fused == "no" or dropout:
            return False
        if self.fused == "yes":
            return True
        # Training has one length; evaluation would compile for each.
        if not (query.is_cuda and torch.is_grad_enabled() and query.requires_grad):
            return False
        return works(query.device, query.dtype, query.shape[1], key.shape[1], head_dim)

    @cached_property
    def _flex_masks(self) -> dict[int, FlexMask]:
        return {}

    def _flex_mask(self, num_units: int) -> FlexMask:
        if num_units not in self._flex_masks:
            starts = window_start(self.positions, self.window, self.alignment)
            units = self._unit_ends(num_units) if num_units else (None, None)
            self._flex_masks[num_units] = band_mask(starts, self.positions, self.sinks, *units)
        return self._flex_masks[num_units]

    def _unit_ends(self, count: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Where the window of a query must start at least for it to see each unit, and the bias of its logits."""
        raise NotImplementedError("a band without memory has no units")

    def _attend_piece(
        self,
        blocks: slice,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_before: torch.Tensor | None,
        value_before: torch.Tensor | None,
        key_sinks: torch.Tensor | None,
        value_sinks: torch.Tensor | None,
        unit_keys: torch.Tensor | None,
        unit_values: torch.Tensor | None,
        scale: float,
        dropout: float,
    ) -> torch.Tensor:
        """Outputs ``[B, E, Hq, D]`` of the E queries in `blocks`, from their own keys and those of the block before."""
        batch, length = query.shape[0], query.shape[2]
        keys = self._gather(key, key_before, key_sinks, unit_keys)
        values = self._gather(value, value_before, value_sinks, unit_values)
        queries = fold_blocks(in_blocks(query, self.block))
        mask = self._mask(blocks, query.dtype, unit_keys)
        mask = mask[None, :, None].expand(batch, -1, -1, -1, -1).flatten(0, 1)
        out = sdpa(queries, keys, values, scale, mask=mask, dropout=dropout)
        return out.transpose(1, 2).unflatten(0, (batch, -1)).flatten(1, 2)[:, :length]

    def _mask(self, blocks: slice, dtype: torch.dtype, unit_keys: torch.Tensor | None) -> torch.Tensor:
        """What the queries of `blocks` see of what `_gather` lays out for them."""
        return self.mask[blocks]

    def _num_visible(self, blocks: slice) -> int:
        """Units that some query of `blocks` sees: the first ones."""
        return 0

    def _gather(
        self,
        states: torch.Tensor,
        before: torch.Tensor | None,
        sinks: torch.Tensor | None,
        units: torch.Tensor | None,
    ) -> torch.Tensor:
        """Keys or values for every block of a piece, ``[B * blocks, Hkv, 2 * block + s + U, D]``."""
        own = in_blocks(states, self.block)
        first = torch.zeros_like(own[:, :, :1]) if before is None else before[:, :, None]
        parts = [torch.cat([first, own[:, :, :-1]], dim=2), own]
        for shared in (sinks, units):
            if shared is not None:
                parts.append(shared[:, :, None].expand(-1, -1, own.shape[2], -1, -1))
        return fold_blocks(torch.cat(parts, dim=3))


@dataclass
class MemorySpan(BandSpan):
    """A band whose softmax also holds one pooled entry per completed unit outside the window (DESIGN 4, `memory`).

    Attributes:
        pool: ``(layer, keys, values) -> (unit_keys, unit_values)``, ``[B, Hkv, E, D]`` -> ``[B, Hkv, U, D]``.
        unit_span: Tokens under a unit; `alignment` is a multiple of it.
        recorded_units: If given, receives every layer's unit keys and values.
    """

    pool: Callable[[int, torch.Tensor, torch.Tensor], KeyValue] | None = None
    unit_span: int = 1
    recorded_units: dict[int, KeyValue] | None = None

    def attend(self, layer, query, key, value, scale, dropout, sliding_window):
        if self.recorded is not None:
            self.recorded[layer] = (key, value)
        units = self.pool(layer, key, value)
        if self.recorded_units is not None:
            self.recorded_units[layer] = units
        return self._attend_pieces(query, key, value, scale, dropout, units)

    @cached_property
    def _visible(self) -> list[int]:
        """Per block, the units that its last query sees."""
        return (self._starts[:, -1] // self.unit_span).tolist()

    def _num_visible(self, blocks: slice) -> int:
        return self._visible[blocks][-1]

    def _unit_ends(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        device = self.positions.device
        end = (torch.arange(count, device=device) + 1) * self.unit_span
        return end, unit_log_count(count, self.unit_span, 0 if self.sinks is None else len(self.sinks), device)

    def _mask(self, blocks: slice, dtype: torch.dtype, unit_keys: torch.Tensor) -> torch.Tensor:
        """Additive: a unit counts as many times as it has tokens, ``[blocks, block, 2 * block + s + U]``."""
        count, near, starts = unit_keys.shape[2], self.mask[blocks], self._starts[blocks]
        end, tokens = self._unit_ends(count)
        visible = torch.cat([near, end <= starts[:, :, None]], dim=2)
        bias = torch.zeros(visible.shape, dtype=dtype, device=starts.device)
        bias[:, :, near.shape[2] :] = tokens
        return bias.masked_fill_(~visible, -math.inf)
