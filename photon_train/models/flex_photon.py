"""Windows with sinks and memory units as one fused kernel, forward and backward: PyTorch's flex_attention.

For training on a GPU: the mask is evaluated inside the kernel, and blocks of keys that no query of a block sees are
skipped. Every window is described by four vectors: one mask function, compiled once per shape class, serves all.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention.flex_attention import BlockMask, flex_attention

logger = logging.getLogger(__name__)
BLOCK = 128  # queries and keys per block of the mask; lengths are padded to its multiples
NEVER = 2**31 - 1


@dataclass
class FlexMask:
    """Which keys each query sees: query i sees key j if

        ``i >= after[j]`` and ``at_least[j] <= starts[i] <= at_most[j]``.

    For a near key, `after` is its column and `at_most` its index (no limit for a sink); for a far one, `at_least` is
    the end of its unit.

    Attributes:
        starts: First visible element of each query, ``[T]``, non-decreasing.
        after, at_least, at_most: One number per key, ``[T + U]``.
    """

    starts: torch.Tensor
    after: torch.Tensor
    at_least: torch.Tensor
    at_most: torch.Tensor

    @cached_property
    def mask_mod(self) -> Callable:
        """The definition, in the signature of flex_attention."""
        starts, after, at_least, at_most = self.starts, self.after, self.at_least, self.at_most

        def mask_mod(batch, head, query, key):
            start = starts[query]
            return (query >= after[key]) & (at_least[key] <= start) & (start <= at_most[key])

        return mask_mod

    def visible(self) -> torch.Tensor:
        """The mask in full, ``[T, T + U]`` (for checks)."""
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


def padded(values: torch.Tensor, fill: int) -> torch.Tensor:
    """``[T]`` with `fill` at the end, to whole blocks."""
    return F.pad(values, (0, -len(values) % BLOCK), value=fill)


def window_mask(
    starts: torch.Tensor, index: torch.Tensor, num_sinks: int, unit_ends: torch.Tensor | None = None
) -> FlexMask:
    """The mask of a window over T elements, and of U far keys beside it; each padded to whole blocks.

    Args:
        starts: First visible element of each query, ``[T]``; index: its own, ``[T]``.
        num_sinks: Elements that stay visible.
        unit_ends: A far key is seen by queries whose window starts at its unit's end or later, ``[U]``.
    """
    place = torch.arange(len(index), device=index.device)
    after, at_least = padded(place, NEVER), padded(torch.zeros_like(place), NEVER)
    at_most = padded(torch.where(index < num_sinks, NEVER, index), -1)
    starts = torch.cat([starts, starts[-1:].expand(-len(starts) % BLOCK)]).clamp(min=0)
    if unit_ends is not None:
        ends = padded(unit_ends, NEVER)
        after, at_least = torch.cat([after, torch.zeros_like(ends)]), torch.cat([at_least, ends])
        at_most = torch.cat([at_most, torch.full_like(ends, NEVER)])
    return FlexMask(starts.int(), after.int(), at_least.int(), at_most.int())


def far_ends(units: int, chunk_size: int, num_sinks: int, device: torch.device) -> torch.Tensor:
    """The `unit_ends` of `window_mask` for far keys that are single tokens under their units, of so many units; a sink
    is never seen there."""
    token = torch.arange(units * chunk_size, device=device)
    return ((token // chunk_size + 1) * chunk_size).masked_fill(token < num_sinks, NEVER)


def attend_window(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: FlexMask,
    scale: float,
    far: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Attention of a segment without a past to its window, its sinks and far keys.

    Args:
        query: ``[B, Hq, T, D]``; key, value: ``[B, Hkv, T, D]``.
        mask: From `window_mask`, with the far keys' ends where there are any.
        far: The queries as far keys want them, ``[B, Hq, T, D]``, far keys and values ``[B, Hkv, U, D]``.

    Returns:
        ``[B, Hq, T, D]``. Compiled on a GPU.
    """
    function, size = compiled() if query.is_cuda else flex_attention, query.shape[-1]
    if far is not None:
        # One softmax takes rotated scores near and unrotated ones far: a query is both side by side, a near key has
        # zeros for the second half, a far key for the first. Values are padded as well: the kernel wants one width.
        query = torch.cat([query, far[0]], dim=-1)
        key, value = F.pad(key, (0, size)), F.pad(value, (0, size))
        far = tuple(F.pad(part, (size, 0) if number == 0 else (0, size)) for number, part in enumerate(far[1:]))
    return attend_fused(query, key, value, mask, scale, far, function)[..., :size]


def attend_fused(query, key, value, mask: FlexMask, scale: float, far=None, function: Callable = flex_attention):
    """`flex_attention` of ``[B, H, T, D]`` to near keys and far ones ``[B, Hkv, U, D]``, padded to whole blocks.

    Key heads are rows of their own: layers with other numbers of cells are then one shape to the compiler.
    """
    batch, heads, length, size = query.shape
    states = [_whole_blocks(part) for part in (query, key, value)]
    if far is not None:
        states[1:] = (torch.cat([near, _whole_blocks(part)], 2) for near, part in zip(states[1:], far, strict=True))
    rows = batch * key.shape[1]
    query, key, value = (part.reshape(rows, -1, *part.shape[2:]) for part in states)
    out = function(query, key, value, block_mask=mask.block_mask, scale=scale, enable_gqa=query.shape[1] > 1)
    return out.reshape(batch, heads, -1, size)[:, :, :length]


def _whole_blocks(states: torch.Tensor) -> torch.Tensor:
    return F.pad(states, (0, 0, 0, -states.shape[2] % BLOCK))


@functools.cache
def compiled() -> Callable:
    """`flex_attention` as a fused kernel for any number and length of rows: uncompiled, it would hold all scores."""
    # Sizes of one are still compiled for apart; past the limit (8) it would run uncompiled.
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    return torch.compile(flex_attention, dynamic=True)


@functools.cache
def is_usable(device: torch.device, dtype: torch.dtype, queries: int, head_dim: int) -> bool:
    """Whether the compiled kernel runs here and gives what a plain softmax gives, forward and backward.

    Tried once per shape class, on random numbers of two sizes, and logged if not: nothing then depends on it.

    Args:
        queries: Query heads per key head.
    """
    # Compiling takes seconds to minutes, and whoever waits wants to know for what.
    logger.info("compiling windowed attention on %s: the first steps take up to a few minutes", device)
    with outside_checkpoints():
        return all(_try(device, dtype, queries, head_dim, *shape) for shape in ((1, 2), (3, 4)))


def outside_checkpoints() -> saved_tensors_hooks:
    """A context for a trial with gradients of its own whose first call may come from a layer that is checkpointed: that
    layer's hooks would count what the trial saves as the layer's, and stop its second run in the middle of the trial.
    """

    def as_it_is(saved: torch.Tensor) -> torch.Tensor:
        return saved

    return saved_tensors_hooks(as_it_is, as_it_is)


def _try(device, dtype, queries: int, head_dim: int, batch: int, blocks: int) -> bool:
    generator = torch.Generator().manual_seed(0)
    sizes = [(queries, blocks * BLOCK), *[(1, blocks * BLOCK)] * 2, *[(1, 8)] * 2]
    numbers = [torch.randn(batch, *size, head_dim, generator=generator) for size in sizes]
    leaves = [each.to(device, dtype).requires_grad_() for each in numbers]
    query, key, value, *far = leaves
    index = torch.arange(blocks * BLOCK, device=device)
    starts = (index - 31).clamp(min=0) // 16 * 16
    mask = window_mask(starts, index, 3, (torch.arange(8, device=device) + 1) * 16)
    # What the caller runs under must not round the reference.
    with torch.autocast(device.type, enabled=False), torch.enable_grad():
        try:
            out = attend_fused(query, key, value, mask, 0.3, tuple(far), compiled())
            upstream = torch.randn(out.shape, generator=generator).to(device, dtype)
            results = [out, *torch.autograd.grad(out, leaves, upstream)]
        except Exception as error:  # compilers fail in many ways, and the blockwise path is always there
            reason = str(error).split("\n")[0]
            logger.warning("windows are attended to blockwise: flex_attention failed on %s (%s)", device, reason)
            return False
        precise = [leaf.detach().double().requires_grad_() for leaf in leaves]
        pairs = zip(precise[1:3], precise[3:], strict=True)
        joined = [torch.cat([near, _whole_blocks(part)], dim=2) for near, part in pairs]
        keys, values = (part.expand(-1, queries, -1, -1) for part in joined)
        expected = F.scaled_dot_product_attention(precise[0], keys, values, attn_mask=mask.visible(), scale=0.3)
        expected = [expected, *torch.autograd.grad(expected, precise, upstream.double())]
    with torch.no_grad():
        error = max(float((a.double() - b).norm() / b.norm()) for a, b in zip(results, expected, strict=True))
    # Room for tf32 products, and for the rounding of half-precision results.
    if not error < max(2e-3, 4 * torch.finfo(dtype).eps):
        logger.warning("windows are attended to blockwise: flex_attention is off by %.1e on %s", error, device)
        return False
    return True
