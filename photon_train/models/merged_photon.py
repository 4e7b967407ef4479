"""One softmax over keys that are attended to in two parts: a band's, gathered block by block, and a shared far prefix.

Gathering a prefix for every block of a band would copy it as often as there are blocks. Here each part is attended to
by itself and the two are merged by their log-sum-exps; backward, each part takes the merged output and log-sum-exp for
its own, which gives the gradients of the joint softmax exactly (as between the devices of ring attention, arXiv
2310.01889). On a CPU a part runs in PyTorch's flash attention, elsewhere as a plain softmax.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .attention_photon import fold_blocks, in_blocks

# Scores that a far part holds at a time, where they are held, and numbers of its mask.
_SCORES = 2**24
_FLASH_DEVICE = "cpu"  # where a part runs in PyTorch's flash attention


@dataclass
class TwoParts:
    """Where the keys of E queries lie.

    Attributes:
        near_mask: Per block, which of its gathered keys each query sees, ``[blocks, block, K]``.
        far_seen: Far keys that each query sees, the first ones, ``[E]``, non-decreasing; on the CPU.
        far_from: First far key that is seen at all.
        scale: Factor on the dot products.
    """

    near_mask: torch.Tensor
    far_seen: torch.Tensor
    far_from: int
    scale: float

    @property
    def block(self) -> int:
        return self.near_mask.shape[1]

    def fold(self, states: torch.Tensor, fill: float = 0.0) -> torch.Tensor:
        """``[B, H, E, D]`` -> ``[B * blocks, H, block, D]``, padded with `fill`."""
        return fold_blocks(in_blocks(states, self.block, fill))

    def unfold(self, folded: torch.Tensor, batch: int) -> torch.Tensor:
        """Inverse of `fold`, ``[B, H, E, D]``."""
        states = folded.unflatten(0, (batch, -1)).transpose(1, 2).flatten(2, 3)
        return states[:, :, : len(self.far_seen)]

    def near_bias(self, batch: int, groups: int, dtype: torch.dtype) -> torch.Tensor:
        """``[B * blocks, 1, groups * block, K]``, additive."""
        return _additive(self.near_mask, dtype).repeat(batch, groups, 1)[:, None]

    def far_spans(self, batch_heads: int) -> list[tuple[slice, int]]:
        """Queries at a time and the far keys that they see; those before see none."""
        first = int((self.far_seen <= self.far_from).sum())
        spans, total = [], len(self.far_seen)
        while first < total:
            rows = max(1, min(_SCORES // (batch_heads * int(self.far_seen[-1])), 256, total - first))
            spans.append((slice(first, first + rows), int(self.far_seen[first + rows - 1])))
            first += rows
        return spans

    def far_bias(self, rows: slice, count: int, groups: int, like: torch.Tensor) -> torch.Tensor:
        """``[1, 1, groups * rows, count - far_from]``, additive."""
        index = torch.arange(self.far_from, count, device=like.device)
        seen = index < self.far_seen[rows, None].to(like.device)
        return _additive(seen, like.dtype).repeat(groups, 1)[None, None]


def _additive(visible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, -torch.inf)


def merged_attention(
    near: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    far: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    parts: TwoParts,
) -> torch.Tensor:
    """Attend in one softmax to the keys near each block and to the far ones.

    Args:
        near: Queries, folded by `TwoParts.fold`, ``[B * blocks, Hq, block, D]``; keys and values gathered for each
            block, ``[B * blocks, Hkv, K, D]``. Every query sees one of them at least.
        far: The same queries as the far keys want them, ``[B, Hq, E, D]``; far keys and values, ``[B, Hkv, U, D]``.

    Returns:
        ``[B, Hq, E, D]``.
    """
    return _Merged.apply(parts, *near, *far)


class _Merged(torch.autograd.Function):
    @staticmethod
    def forward(ctx, parts, near_query, near_key, near_value, query, key, value):
        batch, heads, groups = *query.shape[:2], query.shape[1] // key.shape[1]
        bias = parts.near_bias(batch, groups, query.dtype)
        out, lse = _forward(near_query, near_key, near_value, bias, parts.scale)
        out, lse = parts.unfold(out, batch).contiguous(), parts.unfold(lse[..., None], batch).contiguous()
        for rows, count in parts.far_spans(batch * heads):
            seen = slice(parts.far_from, count)
            bias = parts.far_bias(rows, count, groups, query)
            far, far_lse = _forward(query[:, :, rows], key[:, :, seen], value[:, :, seen], bias, parts.scale)
            joint = torch.logaddexp(lse[:, :, rows], far_lse[..., None])
            kept = out[:, :, rows] * (lse[:, :, rows] - joint).exp() + far * (far_lse[..., None] - joint).exp()
            out[:, :, rows], lse[:, :, rows] = kept.to(out.dtype), joint
        ctx.parts = parts
        ctx.save_for_backward(near_query, near_key, near_value, query, key, value, out, lse)
        return out

    @staticmethod
    def backward(ctx, upstream):
        parts = ctx.parts
        near_query, near_key, near_value, query, key, value, out, lse = ctx.saved_tensors
        batch, heads, groups = *query.shape[:2], query.shape[1] // key.shape[1]
        bias = parts.near_bias(batch, groups, query.dtype)
        # A padded query has no weights: its log-sum-exp is infinite.
        merged = [parts.fold(upstream), parts.fold(out), parts.fold(lse, torch.inf)[..., 0]]
        near = _backward(near_query, near_key, near_value, bias, parts.scale, *merged)
        far_query, far_key, far_value = (torch.zeros_like(each) for each in (query, key, value))
        for rows, count in parts.far_spans(batch * heads):
            seen = slice(parts.far_from, count)
            bias = parts.far_bias(rows, count, groups, query)
            merged = [upstream[:, :, rows], out[:, :, rows], lse[:, :, rows, 0]]
            found = _backward(query[:, :, rows], key[:, :, seen], value[:, :, seen], bias, parts.scale, *merged)
            far_query[:, :, rows] = found[0]
            far_key[:, :, seen] += found[1]
            far_value[:, :, seen] += found[2]
        return None, *near, far_query, far_key, far_value


def _group(states: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """Query heads of one key head below each other: ``[N, Hq, R, ...]`` -> ``[N, Hkv, groups * R, ...]``."""
    return states.unflatten(1, (kv_heads, -1)).flatten(2, 3)


def _ungroup(states: torch.Tensor, heads: int) -> torch.Tensor:
    return states.unflatten(2, (heads // states.shape[1], -1)).flatten(1, 2)


def _precise(states: torch.Tensor) -> torch.Tensor:
    return states.to(torch.promote_types(states.dtype, torch.float32))


def _forward(query, key, value, bias, scale):
    """Output ``[N, Hq, R, D]`` and log-sum-exp ``[N, Hq, R]``, -inf for a query that sees nothing."""
    heads, query = query.shape[1], _group(query, key.shape[1])
    if query.device.type == _FLASH_DEVICE:
        operation = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, lse = operation(query, key, value, 0.0, False, attn_mask=bias, scale=scale)
        # The operation leaves 0 for a query that sees nothing.
        lse = lse.masked_fill((bias == -torch.inf).all(dim=-1), -torch.inf)
    else:
        scores = _precise(query @ key.transpose(2, 3)) * scale + bias
        lse = scores.logsumexp(dim=-1)
        out = (scores - lse[..., None]).exp().nan_to_num(0.0).to(value.dtype) @ value
    return _ungroup(out, heads), _ungroup(lse, heads)


def _backward(query, key, value, bias, scale, upstream, out, lse):
    """Gradients of query, key and value, given the output and log-sum-exp of a softmax that they are a part of."""
    heads, kv_heads = query.shape[1], key.shape[1]
    query, upstream, out, lse = (_group(each, kv_heads).contiguous() for each in (query, upstream, out, lse))
    if query.device.type == _FLASH_DEVICE:
        operation = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        grads = operation(upstream, query, key, value, out, lse, 0.0, False, attn_mask=bias, scale=scale)
    else:
        weights = (_precise(query @ key.transpose(2, 3)) * scale + bias - lse[..., None]).exp()
        change = _precise(upstream @ value.transpose(2, 3)) - (_precise(upstream) * out).sum(-1, keepdim=True)
        change = (weights * change * scale).to(query.dtype)
        grads = change @ key, change.transpose(2, 3) @ query, weights.to(query.dtype).transpose(2, 3) @ upstream
    return _ungroup(grads[0], heads), grads[1], grads[2]
