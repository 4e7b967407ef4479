"""Bands with sinks, slots and memory units as one fused kernel, forward and backward: PyTorch's flex_attention.

The blockwise path of `attention_photon` gathers each block's keys and leaves the softmax to SDPA; here the mask is
evaluated inside the kernel, and blocks of keys that no query of a block sees are skipped. Every span is described by
four vectors, so that one mask function, compiled once per shape class, serves them all.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention

logger = logging.getLogger(__name__)
BLOCK = 128  # queries and keys per block of the mask; lengths are padded to its multiples
NEVER = 2**31 - 1


@dataclass
class FlexMask:
    """Which keys each query sees: query i sees key j if

        ``i >= after[j]`` and ``at_least[j] <= starts[i] <= at_most[j]``.

    For a token's key, `after` is its index and `at_most` its position (no limit for a sink); for a unit's, `at_least`
    is the end of the unit.

    Attributes:
        starts: First visible token of each query, ``[E]``, non-decreasing.
        after, at_least, at_most: One number per key, ``[E + U]``.
        bias: Added to the logits of each key, float32 ``[E + U]``, or None.
    """

    starts: torch.Tensor
    after: torch.Tensor
    at_least: torch.Tensor
    at_most: torch.Tensor
    bias: torch.Tensor | None = None

    @cached_property
    def mask_mod(self) -> Callable:
        """The definition, in the signature of flex_attention."""
        starts, after, at_least, at_most = self.starts, self.after, self.at_least, self.at_most

        def mask_mod(batch, head, query, key):
            start = starts[query]
            return (query >= after[key]) & (at_least[key] <= start) & (start <= at_most[key])

        return mask_mod

    @cached_property
    def score_mod(self) -> Callable | None:
        """Adds each key's bias."""
        bias = self.bias
        return None if bias is None else lambda score, batch, head, query, key: score + bias[key]

    def visible(self) -> torch.Tensor:
        """The mask in full, ``[E, E + U]`` (for checks)."""
        query, key = (torch.arange(len(side), device=side.device) for side in (self.starts, self.after))
        return self.mask_mod(None, None, query[:, None], key)

    @cached_property
    def block_mask(self) -> BlockMask:
        """Blocks that are seen in part and in full, from bounds per block: the full mask is never built."""
        starts = self.starts.view(-1, BLOCK)
        low, high = starts[:, :1], starts[:, -1:]
        first = torch.arange(len(starts), device=starts.device)[:, None] * BLOCK
        bounds = {}
        for name in ("after", "at_least", "at_most"):
            values = getattr(self, name).view(-1, BLOCK)
            bounds[name] = values.amin(1), values.amax(1)
        some = (
            (first + BLOCK - 1 >= bounds["after"][0]) & (high >= bounds["at_least"][0]) & (low <= bounds["at_most"][1])
        )
        every = (first >= bounds["after"][1]) & (low >= bounds["at_least"][1]) & (high <= bounds["at_most"][0])
        return BlockMask.from_kv_blocks(
            *_listed(some & ~every),
            *_listed(every),
            BLOCK_SIZE=BLOCK,
            mask_mod=self.mask_mod,
            seq_lengths=(len(self.starts), len(self.after)),
        )


def _listed(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Number and indices of each row's true entries, as flex_attention wants them: ``[1, 1, Q]``, ``[1, 1, Q, K]``."""
    counts = blocks.sum(1, dtype=torch.int32)
    indices = torch.argsort(blocks.to(torch.int8), dim=1, descending=True, stable=True).to(torch.int32)
    return counts[None, None], indices[None, None].contiguous()


def padded(values: torch.Tensor, fill: int | float) -> torch.Tensor:
    """``[E]`` with `fill` at the end, to whole blocks."""
    return F.pad(values, (0, -len(values) % BLOCK), value=fill)


def band_mask(
    starts: torch.Tensor,
    positions: torch.Tensor,
    sinks: torch.Tensor | None,
    unit_ends: torch.Tensor | None = None,
    unit_bias: torch.Tensor | None = None,
) -> FlexMask:
    """The mask of a band over E elements, and of U units beside it; each padded to whole blocks.

    Args:
        starts: First visible token of each element, ``[E]``; positions: its token position, ``[E]``.
        sinks: Indices of the elements that stay visible, or None.
        unit_ends: A unit is seen by elements whose window starts at its end or later, ``[U]``.
        unit_bias: Added to a unit's logits, ``[U]``.
    """
    index = torch.arange(len(positions), device=positions.device)
    at_most = positions.clone()
    if sinks is not None:
        at_most[sinks] = NEVER
    after, at_least = padded(index, NEVER), padded(torch.zeros_like(index), NEVER)
    starts, at_most = torch.cat([starts, starts[-1:].expand(-len(starts) % BLOCK)]), padded(at_most, -1)
    bias = None
    if unit_ends is not None:
        ends = padded(unit_ends, NEVER)
        after, at_least = torch.cat([after, torch.zeros_like(ends)]), torch.cat([at_least, ends])
        at_most = torch.cat([at_most, torch.full_like(ends, NEVER)])
        if unit_bias is not None:
            bias = torch.cat([torch.zeros_like(starts, dtype=torch.float32), padded(unit_bias.float(), 0.0)])
    return FlexMask(starts.int(), after.int(), at_least.int(), at_most.int(), bias)


def attend_fused(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: FlexMask,
    scale: float,
    units: tuple[torch.Tensor, torch.Tensor] | None = None,
    function: Callable = flex_attention,
) -> torch.Tensor:
    """Attend with ``query [B, Hq, E, D]`` to ``key, value [B, Hkv, E, D]`` and units ``[B, Hkv, U, D]``.

    Args:
        mask: From `band_mask`, for these lengths.
        function: `flex_attention`, compiled or not.
    """
    length = query.shape[2]
    states = [_whole_blocks(part) for part in (query, key, value)]
    if units is not None and units[0].shape[2]:
        states[1:] = (torch.cat([near, _whole_blocks(far)], 2) for near, far in zip(states[1:], units, strict=True))
    grouped = query.shape[1] != key.shape[1]
    out = function(*states, score_mod=mask.score_mod, block_mask=mask.block_mask, scale=scale, enable_gqa=grouped)
    return out[:, :, :length]


def _whole_blocks(states: torch.Tensor) -> torch.Tensor:
    return F.pad(states, (0, 0, 0, -states.shape[2] % BLOCK))


@functools.cache
def compiled() -> Callable:
    """`flex_attention` as a fused kernel: uncompiled, it would hold all scores."""
    return torch.compile(flex_attention, dynamic=False)


@functools.cache
def works(device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int) -> bool:
    """Whether the compiled kernel runs here and gives what a plain softmax gives, forward and backward.

    Tried once per shape class, on random numbers, and logged if not: nothing then depends on it.
    """
    generator = torch.Generator().manual_seed(0)
    sizes = [(heads, 2 * BLOCK), *[(kv_heads, 2 * BLOCK)] * 2, *[(kv_heads, 8)] * 2]
    numbers = [torch.randn(1, *size, head_dim, generator=generator) for size in sizes]
    leaves = [each.to(device, dtype).requires_grad_() for each in numbers]
    query, key, value, *units = leaves
    positions = torch.arange(2 * BLOCK, device=device)
    starts = (positions - 31).clamp(min=0) // 16 * 16
    ends = (torch.arange(8, device=device) + 1) * 16
    mask = band_mask(starts, positions, positions[:3], ends, ends.log())
    # What the caller runs under must not round the reference.
    with torch.autocast(device.type, enabled=False), torch.enable_grad():
        try:
            out = attend_fused(query, key, value, mask, 0.3, tuple(units), compiled())
            upstream = torch.randn(out.shape, generator=generator).to(device, dtype)
            results = [out, *torch.autograd.grad(out, leaves, upstream)]
        except Exception as error:  # compilers fail in many ways, and the blockwise path is always there
            reason = str(error).split("\n")[0]
            logger.warning("bands are attended to blockwise: flex_attention failed on %s (%s)", device, reason)
            return False
        precise = [leaf.detach().double().requires_grad_() for leaf in leaves]
        pairs = zip(precise[1:3], precise[3:], strict=True)
        joined = [torch.cat([near, _whole_blocks(far)], dim=2) for near, far in pairs]
        keys, values = (part.repeat_interleave(heads // kv_heads, dim=1) for part in joined)
        bias = torch.where(mask.visible(), mask.bias.double(), -torch.inf)
        expected = F.scaled_dot_product_attention(precise[0], keys, values, attn_mask=bias, scale=0.3)
        expected = [expected, *torch.autograd.grad(expected, precise, upstream.double())]
    with torch.no_grad():
        error = max(float((a.double() - b).norm() / b.norm()) for a, b in zip(results, expected, strict=True))
    # Room for tf32 products, and for the rounding of half-precision results.
    if not error < max(2e-3, 4 * torch.finfo(dtype).eps):
        logger.warning("bands are attended to blockwise: flex_attention is off by %.1e on %s", error, device)
        return False
    return True
