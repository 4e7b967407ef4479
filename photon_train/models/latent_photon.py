"""Memory units as latents: S tokens' keys and values packed into one vector, and unpacked again where they are read.

The paper's chunker (C states -> 1) and converter (1 -> R slots) inside a layer's own softmax: a unit's latent has the
width of one key and value, and gives one key and value *per token* under the unit when a layer reads it, so that single
tokens can be told apart (a pooled entry is a superposition of them). The low-rank joint compression of keys and values
of multi-head latent attention (arXiv 2405.04434), here over the tokens of a unit, and shared by layers if wanted.

Far keys carry no position: queries meet them unrotated. Beyond the window, where units are read, what a retrieval head
matches is content; and scores stay linear in the latent, so that decoding folds the converter into the query.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PretrainedConfig

from .attention_photon import PIECE, BandSpan, KeyValue
from .flex_photon import NEVER
from .merged_photon import TwoParts, merged_attention


def kv_shape(base_config: PretrainedConfig) -> tuple[int, int]:
    """Key-value heads and head dimension."""
    head_dim = getattr(base_config, "head_dim", None) or base_config.hidden_size // base_config.num_attention_heads
    return base_config.num_key_value_heads, head_dim


class LatentChunker(nn.Module):
    """Keys and values of S tokens -> one latent, plus a correction by the unit's encoder state (gate zero at first).

    Args:
        base_config: The dense family's configuration.
        span: S.
        num_parts: 1 packs keys and values together; 2 apart, each into its half of the latent.
    """

    def __init__(self, base_config: PretrainedConfig, span: int, num_parts: int = 1) -> None:
        super().__init__()
        self.span = span
        self.heads, self.head_dim = kv_shape(base_config)
        self.width = 2 * self.heads * self.head_dim
        size = self.width // num_parts
        self.parts = nn.ModuleList(nn.Linear(span * size, size, bias=False) for _ in range(num_parts))
        self.state_proj = nn.Linear(base_config.hidden_size, self.width, bias=False)
        self.state_gate = nn.Parameter(torch.zeros(self.width))

    def forward(self, keys: torch.Tensor, values: torch.Tensor, unit_states: torch.Tensor) -> KeyValue:
        """Pack U units.

        Args:
            keys: The layer's own, unrotated, ``[B, Hkv, U, S, D]``; values: the same shape.
            unit_states: Encoder states of the units, ``[B, U, d]``.

        Returns:
            The latents in the shape of keys and values, ``[B, Hkv, U, D]`` each.
        """
        given = join_heads(keys, values).chunk(len(self.parts), dim=-1)
        latent = torch.cat([part(one.flatten(-2)) for part, one in zip(self.parts, given, strict=True)], dim=-1)
        latent = latent + self.state_gate * self.state_proj(unit_states)
        return split_heads(latent.to(keys.dtype), self.heads)


class LatentMap(nn.Linear):
    """A linear map of latents that decoding applies to queries and sums instead.

    Its weights are read in its forward alone: that is where hooks that offload or shard weights have them in place.
    """

    def forward(self, states: torch.Tensor | None, use: Callable | None = None):
        """Map `states`, or give ``use(weight, bias)``."""
        return super().forward(states) if use is None else use(self.weight, self.bias)


class LatentConverter(nn.Module):
    """One latent -> a key and a value for each of the S tokens under the unit, for one layer.

    Arguments as for `LatentChunker`.
    """

    def __init__(self, base_config: PretrainedConfig, span: int, num_parts: int = 1) -> None:
        super().__init__()
        self.span = span
        self.heads, self.head_dim = kv_shape(base_config)
        size = 2 * self.heads * self.head_dim // num_parts
        self.parts = nn.ModuleList(LatentMap(size, span * size) for _ in range(num_parts))

    def forward(self, keys: torch.Tensor, values: torch.Tensor) -> KeyValue:
        """Unpack latents ``[B, Hkv, U, D]`` (the two halves) to keys and values ``[B, Hkv, U * S, D]``."""
        given = join_heads(keys, values).chunk(len(self.parts), dim=-1)
        slots = [part(one).unflatten(-1, (self.span, -1)) for part, one in zip(self.parts, given, strict=True)]
        return split_heads(torch.cat(slots, dim=-1).flatten(1, 2).to(keys.dtype), self.heads)

    def with_map(self, half: int, use: Callable[[torch.Tensor, torch.Tensor], Any]) -> Any:
        """``use(matrix, bias)`` of what it does to one latent for keys (`half` 0) or values (-1).

        The matrix is ``[S, Hkv, D, C]``, the bias ``[S, Hkv, D]``; C is the width of what is read: the latent, or of
        two parts its own half.
        """
        shape = (self.span, 2 // len(self.parts), self.heads, self.head_dim)
        return self.parts[half](
            None, lambda weight, bias: use(weight.unflatten(0, shape)[:, half], bias.unflatten(0, shape)[:, half])
        )


def fold_queries(content: torch.Tensor, converter: LatentConverter) -> tuple[torch.Tensor, torch.Tensor]:
    """Do to queries what the converter would do to every latent's keys.

    The absorption of multi-head latent attention (arXiv 2405.04434): the logit of the token at place s under a unit is
    the latent's product with the query folded for s, plus a bias.

    Args:
        content: Unrotated queries, ``[n, Hq, D]``.

    Returns:
        ``[n, Hq, S, C]``, C as in `LatentConverter.with_map`, and biases ``[n, Hq, S]``.
    """
    content = content.unflatten(1, (converter.heads, -1))

    def fold(key_map, key_bias):
        folded = torch.einsum("nhgd,shdc->nhgsc", content, key_map)
        return folded.flatten(1, 2), torch.einsum("nhgd,shd->nhgs", content, key_bias).flatten(1, 2)

    return converter.with_map(0, fold)


def unfold_values(mixed: torch.Tensor, mass: torch.Tensor, converter: LatentConverter) -> torch.Tensor:
    """Weighted sums of values from weighted sums of latents ``[n, Hq, S, C]`` and the weights' ``[n, Hq, S]``.

    Returns:
        ``[n, Hq, D]``.
    """
    mixed, mass = (states.unflatten(1, (converter.heads, -1)) for states in (mixed, mass.to(mixed.dtype)))

    def unfold(value_map, value_bias):
        out = torch.einsum("nhgsc,shdc->nhgd", mixed, value_map) + torch.einsum("nhgs,shd->nhgd", mass, value_bias)
        return out.flatten(1, 2)

    return converter.with_map(-1, unfold)


def attend_folded(
    query: torch.Tensor,
    content: torch.Tensor,
    near: KeyValue,
    latents: KeyValue,
    converter: LatentConverter,
    visible: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Attention of one query per row over a window and over latents that are never unpacked.

    Args:
        query: Rotated, ``[n, Hq, D]``; content: unrotated.
        near: Keys and values of the window, ``[n, Hkv, N, D]``.
        latents: Halves of the latents, ``[n, Hkv, U, D]``.
        visible: Entries of the window, then tokens under units, that each query sees, ``[n, N + U * S]``.

    Returns:
        ``[n, Hq, D]``.
    """
    whole, count = join_heads(*latents), near[0].shape[2]
    parts = whole.chunk(len(converter.parts), dim=-1)
    folded, bias = fold_queries(content, converter)
    far = torch.einsum("nhsc,nuc->nhus", folded, parts[0]) + bias[:, :, None]
    grouped = query.unflatten(1, (converter.heads, -1))
    close = torch.einsum("nhgd,nhkd->nhgk", grouped, near[0]).flatten(1, 2)
    scores = torch.cat([close, far.flatten(2)], dim=-1).float() * scale
    weights = scores.masked_fill(~visible[:, None], -torch.inf).softmax(dim=-1).to(query.dtype)
    close, far = weights[..., :count], weights[..., count:].unflatten(-1, (-1, converter.span))
    out = torch.einsum("nhgk,nhkd->nhgd", close.unflatten(1, (converter.heads, -1)), near[1]).flatten(1, 2)
    return out + unfold_values(torch.einsum("nhus,nuc->nhsc", far, parts[-1]), far.sum(2), converter)


def join_heads(keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """``[B, Hkv, ..., D]`` twice -> ``[B, ..., 2 * Hkv * D]``."""
    return torch.stack([keys, values], dim=1).flatten(1, 2).movedim(1, -2).flatten(-2)


def split_heads(states: torch.Tensor, heads: int) -> KeyValue:
    """``[B, E, 2 * Hkv * D]`` -> keys and values ``[B, Hkv, E, D]``."""
    keys, values = states.unflatten(-1, (2, heads, -1)).movedim(2, 0)
    return keys.transpose(1, 2), values.transpose(1, 2)


def widen_near(query: torch.Tensor, content: torch.Tensor, key: torch.Tensor, value: torch.Tensor):
    """Queries, keys and values of 2 D, so that one softmax takes rotated scores near and unrotated ones far.

    A query is its rotated and its unrotated half side by side; a near key has zeros for the second half, a far key
    (`widen_far`) for the first. Values are padded as well: fused attention wants one width.
    """
    size = query.shape[-1]
    return torch.cat([query, content], dim=-1), F.pad(key, (0, size)), F.pad(value, (0, size))


def widen_far(keys: torch.Tensor, values: torch.Tensor) -> KeyValue:
    """See `widen_near`."""
    size = keys.shape[-1]
    return F.pad(keys, (size, 0)), F.pad(values, (0, size))


@dataclass
class LatentSpan(BandSpan):
    """A band whose softmax also holds, one by one, the tokens under completed units outside the window.

    Attributes:
        pack: ``(source layer, keys, values) -> latents``, ``[B, Hkv, E, D] -> [B, Hkv, U, D]``.
        unpack: ``(layer, latents) -> keys and values``, ``[B, Hkv, U, D] -> [B, Hkv, U * S, D]``.
        turn_back: Unrotates queries.
        sources: For each layer, the layer whose latents it reads.
        unit_span: Tokens under a unit; `alignment` is a multiple of it.
        recorded_units: If given, receives the latents by source layer.
    """

    pack: Callable[[int, torch.Tensor, torch.Tensor], KeyValue] | None = None
    unpack: Callable[[int, KeyValue], KeyValue] | None = None
    turn_back: Callable[[torch.Tensor], torch.Tensor] | None = None
    sources: dict[int, int] = field(default_factory=dict)
    unit_span: int = 1
    recorded_units: dict[int, KeyValue] | None = None

    def __post_init__(self) -> None:
        self._latents: dict[int, KeyValue] = {}

    def attend(self, layer, query, key, value, scale, dropout, sliding_window):
        if self.recorded is not None:
            self.recorded[layer] = (key, value)
        source = self.sources[layer]
        if source == layer:
            self._latents[layer] = self.pack(layer, key, value)
            if self.recorded_units is not None:
                self.recorded_units[layer] = self._latents[layer]
        far, content = self.unpack(layer, self._latents[source]), self.turn_back(query)
        if dropout or self._is_fused(query, key, dropout, 2 * query.shape[-1]):
            near = widen_near(query, content, key, value)
            return self._attend_pieces(*near, scale, dropout, widen_far(*far))[..., : query.shape[-1]]
        return self._attend_merged(query, content, key, value, scale, *far)

    def _attend_merged(self, query, content, key, value, scale, far_keys, far_values):
        """The far keys are unpacked once and copied for no block (`merged_photon`)."""
        seen = (self._starts.flatten()[: query.shape[2]] // self.unit_span * self.unit_span).cpu()
        sinks = [None, None] if self.sinks is None else [key[:, :, self.sinks], value[:, :, self.sinks]]
        per_piece, outputs = max(1, PIECE // self.block), []
        for first in range(0, self.num_blocks, per_piece):
            blocks, start = slice(first, first + per_piece), first * self.block
            rows = slice(start, start + per_piece * self.block)
            before = [side[:, :, start - self.block : start] if start else None for side in (key, value)]
            near = [
                self._gather(side[:, :, rows], previous, sink, None)
                for side, previous, sink in zip((key, value), before, sinks, strict=True)
            ]
            parts = TwoParts(self.mask[blocks], seen[rows], 0 if self.sinks is None else len(self.sinks), scale)
            far = (content[:, :, rows], far_keys, far_values)
            outputs.append(merged_attention((parts.fold(query[:, :, rows]), *near), far, parts))
        return torch.cat(outputs, dim=2)

    @cached_property
    def _visible(self) -> list[int]:
        """Per block, the tokens under the units that its last query sees."""
        return (self._starts[:, -1] // self.unit_span * self.unit_span).tolist()

    def _num_visible(self, blocks: slice) -> int:
        return self._visible[blocks][-1]

    def _mask(self, blocks: slice, dtype: torch.dtype, unit_keys: torch.Tensor) -> torch.Tensor:
        """``[blocks, block, 2 * block + s + U * S]``; sinks are seen beside the window, not under their unit."""
        outside = self._unit_ends(unit_keys.shape[2])[0] <= self._starts[blocks, :, None]
        return torch.cat([self.mask[blocks], outside], dim=2)

    def _unit_ends(self, count: int) -> tuple[torch.Tensor, None]:
        token = torch.arange(count, device=self.positions.device)
        end = (token // self.unit_span + 1) * self.unit_span
        return end.masked_fill(token < (0 if self.sinks is None else len(self.sinks)), NEVER), None
