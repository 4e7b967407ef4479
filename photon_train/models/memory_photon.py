"""Memory units as latents: S tokens' keys and values packed into one vector, and unpacked again where they are read.

The paper's chunker (C states -> 1) and converter (1 -> R slots) inside a layer's own softmax: a unit's latent has the
width of one key and value, and gives one key and value *per token* under the unit when the layer reads it, so that
single tokens can be told apart. The low-rank joint compression of keys and values of multi-head latent attention (arXiv
2405.04434), here over the tokens of a unit. A layer packs the key-value heads of its memory cells alone, and only the
query heads of these read what is far.

Far keys carry no position: queries meet them with their rotation undone. Beyond the window, where units are read, what
a retrieval head matches is content; and scores stay linear in the latent, so that decoding folds the converter into the
query.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import initialization as init

from .attention_photon import load_kernels
from .configuration_photon import PhotonConfig
from .quantize_photon import StoredVectors, StraightThrough, dequantize, quantize
from .softmax_photon import capped, merge
from .stores_photon import KeyValue


class _Map(nn.Linear):
    """A linear map whose weights kernels may use in place of it.

    They are read in its forward alone: that is where hooks that offload or shard weights have them in place.
    """

    def forward(self, states: torch.Tensor | None, use: Callable | None = None):
        """Map `states`, or give ``use(weight, bias)``."""
        return super().forward(states) if use is None else use(self.weight, self.bias)


class PackMap(_Map):
    """A linear map of the tokens under a unit to a latent."""


class LatentMap(_Map):
    """A linear map of latents that decoding applies to queries and sums instead."""


class Chunker(nn.Module):
    """Keys and values of S tokens -> one latent."""

    def __init__(self, chunk_size: int, width: int, num_latents: int) -> None:
        super().__init__()
        size = width // num_latents
        self.maps = nn.ModuleList(PackMap(chunk_size * size, size) for _ in range(num_latents))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """``[B, U, S, width] -> [B, U, width]``."""
        given = states.chunk(len(self.maps), dim=-1)
        return torch.cat([part(one.flatten(-2)) for part, one in zip(self.maps, given, strict=True)], dim=-1)


class Converter(nn.Module):
    """One latent -> keys and values of the S tokens under the unit."""

    def __init__(self, chunk_size: int, width: int, num_latents: int) -> None:
        super().__init__()
        self.chunk_size = chunk_size
        size = width // num_latents
        self.maps = nn.ModuleList(LatentMap(size, chunk_size * size) for _ in range(num_latents))

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """``[B, U, width] -> [B, U, S, width]``."""
        given = latents.chunk(len(self.maps), dim=-1)
        slots = [part(one).unflatten(-1, (self.chunk_size, -1)) for part, one in zip(self.maps, given, strict=True)]
        return torch.cat(slots, dim=-1)


class LayerMemory(nn.Module):
    """What one memory layer adds to its dense attention.

    Args:
        config: Gives S, the layer's cells, the heads' dimension, latents per unit and their bits.
        layer: The layer.

    Attributes:
        cells: Key-value heads with memory, m of them.
        query_heads: Query heads that read them, ``m * Hq / Hkv``.
        other_cells, other_query_heads: The layer's others.
    """

    def __init__(self, config: PhotonConfig, layer: int) -> None:
        super().__init__()
        self.cells = tuple(config.memory_cells[layer])
        self.other_cells = tuple(head for head in range(config.num_key_value_heads) if head not in self.cells)
        groups = config.num_attention_heads // config.num_key_value_heads
        self.query_heads, self.other_query_heads = (
            tuple(head * groups + group for head in heads for group in range(groups))
            for heads in (self.cells, self.other_cells)
        )
        self.chunk_size, self.heads, self.head_dim = config.chunk_size, len(self.cells), config.head_dim
        self.num_latents, self.bits = config.latents_per_unit, config.memory_bits
        width = 2 * self.heads * self.head_dim
        self.chunker = Chunker(self.chunk_size, width, self.num_latents)
        self.converter = Converter(self.chunk_size, width, self.num_latents)

    def pack(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[KeyValue, tuple[torch.Tensor, ...]]:
        """Pack the tokens of U units.

        Args:
            keys: Of the cells, with their rotation undone, ``[B, m, U * S, D]``; values: the same shape.

        Returns:
            The latents as they are read, in the shape of keys and values, ``[B, m, U, D]`` each; and what the cache
            stores of them, the same or codes and scales (`quantize`). Gradients pass through the rounding.
        """
        states = join_heads(keys, values).unflatten(1, (-1, self.chunk_size))
        latents = split_heads(self.chunker(states).to(keys.dtype), self.heads)
        if self.bits == 16:
            return latents, latents
        codes, scales = zip(*(quantize(half.detach(), self.bits) for half in latents), strict=True)
        stored = (*codes, *scales)
        rounded = self.load(stored, keys.dtype)
        return tuple(map(StraightThrough.apply, latents, rounded)), stored

    def pack_stored(self, states: KeyValue, rotary: KeyValue, is_interleaved: bool, targets, **where) -> None:
        """Pack a unit of each row and store it, by one kernel.

        Args:
            states: Keys, rotated, and values where they are held, ``[R, Hkv, N, D]`` each.
            rotary: Cosine and sine of the units' tokens, ``[n or 1, S, D]`` each.
            is_interleaved: See `unrotate`.
            targets: Memory of the latents (a store's `operands`).
            where: `rows`, `slots`, `units` and `block_table` of `unit_pack`.
        """

        def run(weights: KeyValue, biases: KeyValue) -> None:
            heads = _index(self.cells, states[0].device)
            settings = {**where, "bits": self.bits, "is_interleaved": is_interleaved, "backend": "triton"}
            given = {"heads": heads, "weights": weights, "biases": biases, "targets": targets}
            load_kernels().unit_pack(*states, cosine=rotary[0], sine=rotary[1], **given, **settings)

        first, *rest = self.chunker.maps
        if rest:
            first(None, lambda *keys: rest[0](None, lambda *values: run(*zip(keys, values, strict=True))))
        else:
            first(None, lambda weight, bias: run(weight.chunk(2), bias.chunk(2)))

    def load(self, stored: tuple[torch.Tensor, ...], dtype: torch.dtype) -> KeyValue:
        """Latents ``[B, m, U, D]`` from what the cache stores of them; codes become numbers of `dtype`."""
        if self.bits == 16:
            return stored
        halves = zip(stored[:2], stored[2:], strict=True)
        return tuple(dequantize(codes, scales, self.bits, dtype) for codes, scales in halves)

    def unpack(self, keys: torch.Tensor, values: torch.Tensor) -> KeyValue:
        """Unpack latents ``[B, m, U, D]`` (the two halves) to keys and values ``[B, m, U * S, D]``."""
        slots = self.converter(join_heads(keys, values))
        return split_heads(slots.flatten(1, 2).to(keys.dtype), self.heads)

    def _with_map(self, half: int, use: Callable[[torch.Tensor, torch.Tensor], Any]) -> Any:
        """``use(matrix, bias)`` of what the converter does to one latent for keys (`half` 0) or values (-1).

        The matrix is ``[S, m, D, C]``, the bias ``[S, m, D]``; C is the width of what is read: the latent, or of
        two latents its own half.
        """
        shape = (self.chunk_size, 2 // self.num_latents, self.heads, self.head_dim)
        return self.converter.maps[half](
            None, lambda weight, bias: use(weight.unflatten(0, shape)[:, half], bias.unflatten(0, shape)[:, half])
        )

    def fold_queries(self, content: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Do to queries what the converter would do to every latent's keys.

        The absorption of multi-head latent attention: the logit of token s under a unit is the latent's product with
        the query folded for s, plus a bias.

        Args:
            content: Queries that read far with their rotation undone, ``[n, H, D]``.

        Returns:
            ``[n, H, S, C]``, C as in `_with_map`, and biases ``[n, H, S]``.
        """
        content = content.unflatten(1, (len(self.cells), -1))

        def fold(key_map, key_bias):
            folded = torch.einsum("nhgd,shdc->nhgsc", content, key_map)
            return folded.flatten(1, 2), torch.einsum("nhgd,shd->nhgs", content, key_bias).flatten(1, 2)

        return self._with_map(0, fold)

    def unfold_values(self, mixed: torch.Tensor, mass: torch.Tensor) -> torch.Tensor:
        """Weighted sums of values from weighted sums of latents ``[n, H, S, C]`` and the weights' ``[n, H, S]``.

        Returns:
            ``[n, H, D]``.
        """
        mixed, mass = (states.unflatten(1, (len(self.cells), -1)) for states in (mixed, mass.to(mixed.dtype)))

        def unfold(value_map, value_bias):
            out = torch.einsum("nhgsc,shdc->nhgd", mixed, value_map)
            return (out + torch.einsum("nhgs,shd->nhgd", mass, value_bias)).flatten(1, 2)

        return self._with_map(-1, unfold)

    def attend_folded(
        self,
        content: torch.Tensor,
        stored: tuple[torch.Tensor, ...],
        visible: torch.Tensor,
        scale: float,
        softcap: float | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention of one query per row over latents that are neither unpacked nor, if quantised, scaled.

        Args:
            content: Queries that read far with their rotation undone, ``[n, H, D]``.
            stored: The latents as the cache stores them (`pack`), ``[n, m, U, size]`` each.
            visible: Which tokens under units each query sees, ``[n, U * S]``.
            scale, softcap: Factor on the dot products, and the bound of what they become (`capped`).

        Returns:
            Output ``[n, H, 1, D]`` and log-sum-exp ``[n, H, 1]``, -inf where nothing is seen.
        """
        folded, bias = self.fold_queries(content)
        scales = stored[2:] or (None, None)
        halves = [StoredVectors(*half, self.bits, content.dtype) for half in zip(stored[:2], scales, strict=True)]
        # ``[n, 1, S, U]``, for the scores of every head.
        hidden = ~visible.unflatten(-1, (-1, self.chunk_size)).transpose(1, 2)[:, None]
        pieces = list(zip(*(half.pieces() for half in halves), strict=True))
        masks = hidden.split([piece[0].states.shape[2] for piece in pieces], dim=-1)
        parts = (
            self._attend_piece(folded, bias, piece, mask, scale, softcap)
            for piece, mask in zip(pieces, masks, strict=True)
        )
        sums, lse = functools.reduce(merge, parts)
        return self.unfold_values(sums[..., :-1].to(content.dtype), sums[..., -1])[:, :, None], lse

    def attend_stored(
        self,
        query: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        is_interleaved: bool,
        stored: list[torch.Tensor],
        visible: torch.Tensor,
        near: KeyValue,
        scale: float,
        **settings: Any,
    ) -> KeyValue:
        """`attend_folded` by kernels, joined with what the query heads have found among near keys.

        Args:
            query: Of all heads, one per row, ``[n, Hq, 1, D]``, rotated.
            rotary: Cosine and sine of the rows' positions, ``[n or 1, 1, D]`` each.
            is_interleaved: See `unrotate`.
            stored: The latents in the cache's own memory (a store's `operands`).
            visible: Units that each row sees, ``[n or 1]``.
            near: Output ``[n, Hq, 1, D]`` and log-sum-exp ``[n, Hq, 1]``; both are overwritten.
            scale: Factor on the dot products.
            settings: Of `latent_decode`: rows, block table and first token.

        Returns:
            Output and log-sum-exp over all keys, the memory of `near`.
        """
        kernels, heads = load_kernels(), _index(self.query_heads, query.device)
        out, lse = near
        angles = (part[:, 0] for part in rotary)

        def fold(matrix: torch.Tensor, bias: torch.Tensor) -> KeyValue:
            given = (query[:, :, 0], heads, matrix, bias, *angles, is_interleaved)
            return kernels.latent_queries(*given, backend="triton")

        def unfold(matrix: torch.Tensor, bias: torch.Tensor) -> None:
            kernels.latent_outputs(*found, heads, matrix, bias, out[:, :, 0], lse[:, :, 0], backend="triton")

        scales = tuple(stored[2:]) or None
        found = kernels.latent_decode(
            *self._with_map(0, fold),
            *stored[:2],
            visible.expand(query.shape[0]),
            scale,
            scales=scales,
            bits=self.bits,
            backend="triton",
            **settings,
        )
        self._with_map(-1, unfold)
        return near

    def _attend_piece(
        self,
        folded: torch.Tensor,
        bias: torch.Tensor,
        halves: tuple[StoredVectors, ...],
        hidden: torch.Tensor,
        scale: float,
        softcap: float | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Sums of some latents under their softmax, and of its weights as the last column: ``[n, H, S, C + 1]``.

        And log-sum-exps ``[n, H, 1]``, as `merge` takes both.
        """
        reads, mixes = (halves, halves) if self.num_latents == 1 else (halves[:1], halves[1:])
        queries = folded.flatten(1, 2).chunk(len(reads), dim=-1)
        scores = sum(part.dot(query) for query, part in zip(queries, reads, strict=True))
        scores = (scores.unflatten(1, bias.shape[1:]) + bias[..., None]) * scale
        scores = capped(scores, softcap).masked_fill_(hidden, -torch.inf)
        lse = scores.flatten(2).logsumexp(dim=-1)
        weights = (scores - lse[..., None, None]).exp_().nan_to_num_(0.0)
        mixed = torch.cat([part.mix(weights.flatten(1, 2)) for part in mixes], dim=-1)
        return torch.cat([mixed.unflatten(1, bias.shape[1:]), weights.sum(-1, keepdim=True)], dim=-1), lse[..., None]


def initialize(module: nn.Module) -> bool:
    """Give a map of a memory its starting value (a mean, or copies); False if `module` is none."""
    # Asked of the maps, not of what holds them: transformers skips modules without parameters of their own.
    if isinstance(module, PackMap):
        count = module.in_features // module.out_features
        eye = torch.eye(module.out_features, device=module.weight.device)
        init.copy_(module.weight, eye.repeat(1, count) / count)
        init.zeros_(module.bias)
    elif isinstance(module, LatentMap):
        count = module.out_features // module.in_features
        init.copy_(module.weight, torch.eye(module.in_features, device=module.weight.device).repeat(count, 1))
        init.zeros_(module.bias)
    else:
        return False
    return True


@functools.cache
def _index(heads: tuple[int, ...], device: torch.device) -> torch.Tensor:
    # Made once, where nothing is recorded: passes with gradients and CUDA graphs use it too.
    with torch.inference_mode(False):
        return torch.tensor(heads, dtype=torch.long, device=device)


def take_heads(states: torch.Tensor, heads: tuple[int, ...]) -> torch.Tensor:
    """``[B, H, ...]`` of some heads; `states` itself if these are all."""
    return states if len(heads) == states.shape[1] else states.index_select(1, _index(heads, states.device))


def put_heads(states: torch.Tensor, heads: tuple[int, ...], new: torch.Tensor) -> torch.Tensor:
    """`states` with those of `heads` replaced."""
    return new if len(heads) == states.shape[1] else states.index_copy(1, _index(heads, states.device), new)


def take_heads_back(states: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
    """All heads in their own order, of which `states` has the ``order[i]``-th at i."""
    return states.index_select(1, _index(tuple(sorted(range(len(order)), key=order.__getitem__)), states.device))


def join_heads(keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """``[B, Hkv, E, D]`` twice -> ``[B, E, 2 * Hkv * D]``."""
    return torch.stack([keys, values], dim=1).flatten(1, 2).transpose(1, 2).flatten(2)


def split_heads(states: torch.Tensor, heads: int) -> KeyValue:
    """``[B, E, 2 * Hkv * D]`` -> keys and values ``[B, Hkv, E, D]``."""
    keys, values = states.unflatten(-1, (2, heads, -1)).movedim(2, 0)
    return keys.transpose(1, 2), values.transpose(1, 2)
