"""One softmax over several sets of keys, block by block: a window's, and a prefix of far keys that all queries share.

Each set is attended to by itself and the results are merged by their log-sum-exps; backward, each set takes the merged
output and log-sum-exp for its own, which gives the gradients of the joint softmax exactly (as between the devices of
ring attention, arXiv 2310.01889). No keys are gathered: a block of queries reads slices of what lies there. On a CPU a
set runs in PyTorch's flash attention, elsewhere as a plain softmax.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch

_FLASH_DEVICE = "cpu"  # where a set of keys runs in PyTorch's flash attention


class NearKeys(NamedTuple):
    """The keys near one block of queries.

    Attributes:
        queries: The block.
        past: Slots of the past that it sees: the first so many.
        first: Own keys (of the segment) from here to the block's end; `sinks` own keys from 0 on lie before them.
        sinks: Own keys that may be sinks and lie before `first`.
        bias: Additive mask over past, sinks and own keys, ``[1 or B, 1, R, K]``; None sees all.
    """

    queries: slice
    past: int
    sinks: int
    first: int
    bias: torch.Tensor | None


class FarKeys(NamedTuple):
    """Far keys of one block: a slice of them, and the additive mask ``[1 or B, 1, R, K]`` (None: all are seen)."""

    keys: slice
    bias: torch.Tensor | None


class Plan(Protocol):
    """Which keys every block of queries sees."""

    def near(self, like: torch.Tensor) -> Iterator[NearKeys]:
        """The blocks, in order, with their near keys; masks have the type of `like`."""

    def far(self, queries: slice, like: torch.Tensor) -> Iterator[FarKeys]:
        """Sets of far keys of a block; none if it sees none."""


def additive(visible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A boolean mask as zeros and minus infinities."""
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, -torch.inf)


def merge(first: tuple[torch.Tensor, torch.Tensor], second: tuple[torch.Tensor, torch.Tensor]):
    """Output and log-sum-exp of the softmax over two disjoint sets of keys, from those of each.

    Outputs are ``[B, H, R, D]``, log-sum-exps ``[B, H, R]`` (-inf where nothing is seen).
    """
    (out, lse), (other, other_lse) = first, second
    joint = torch.logaddexp(lse, other_lse)
    weights = ((part - joint).exp().nan_to_num(0.0).unsqueeze(-1) for part in (lse, other_lse))
    return (out * next(weights) + other * next(weights)).to(out.dtype), joint


def capped(scores: torch.Tensor, softcap: float | None) -> torch.Tensor:
    """Attention scores bounded softly to ``softcap * tanh(scores / softcap)`` (Gemma 2), or as they are for None."""
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def with_sink(
    found: tuple[torch.Tensor, torch.Tensor], sink_logits: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Let a softmax have one more key per head: its value is zero, its score a learned logit (gpt-oss).

    It takes its share of the weights once, so it is added to what all sets of keys were merged to.

    Args:
        found: Output ``[B, H, R, D]`` and log-sum-exp ``[B, H, R]`` of the keys that are seen.
        sink_logits: ``[H]``; None: there is no such key.
    """
    if sink_logits is None:
        return found
    out, lse = found
    sink = sink_logits.to(lse.dtype)[:, None]
    return (out * (lse - sink).sigmoid()[..., None]).to(out.dtype), torch.logaddexp(lse, sink)


def attend_set(query, key, value, bias, scale, may_see_none: bool = False, softcap: float | None = None):
    """Attend to one set of keys.

    Args:
        query: ``[B, Hq, R, D]``; key, value: ``[B, Hkv, K, D]``.
        bias: Additive mask, ``[1 or B, 1, R, K]``, or None.
        may_see_none: Whether `bias` may leave a query without any key.
        softcap: See `capped`.

    Returns:
        Output ``[B, Hq, R, D]`` and log-sum-exp ``[B, Hq, R]`` in fp32 (-inf for a query that sees nothing).
    """
    # The operation gives its log-sum-exp no gradient, which what is merged afterwards asks for.
    differentiates = torch.is_grad_enabled() and any(each.requires_grad for each in (query, key, value))
    # For one query its kernel takes up to ten times as long in half precision as two products do.
    is_half_decode = query.shape[2] == 1 and query.dtype.itemsize == 2
    if query.device.type == _FLASH_DEVICE and softcap is None and not (is_half_decode or differentiates):
        operation = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, lse = operation(query, key, value, 0.0, False, attn_mask=bias, scale=scale)
        if may_see_none and bias is not None:
            # The operation leaves 0 for a query that sees nothing.
            lse = lse.masked_fill((bias == -torch.inf).all(dim=-1), -torch.inf)
        return out, lse
    # A head's group of queries is read together: no key is copied for each of them.
    grouped = query.unflatten(1, (key.shape[1], -1))
    scores = _precise(grouped.flatten(2, 3) @ key.transpose(2, 3)).view(*grouped.shape[:4], -1)
    scores = capped(scores * scale, softcap)
    if bias is not None:
        scores = scores + bias.unsqueeze(2)
    lse = scores.logsumexp(dim=-1)
    weights = (scores - lse[..., None]).exp().nan_to_num(0.0).to(value.dtype)
    out = (weights.flatten(2, 3) @ value).view(*grouped.shape[:4], -1)
    return out.flatten(1, 2), lse.flatten(1, 2)


def blockwise_attention(
    plan: Plan,
    scale: float,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    past: tuple[torch.Tensor, torch.Tensor] | None = None,
    far: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
    softcap: float | None = None,
    sink_logits: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend in one softmax to the keys near each block of queries and to the far ones.

    Args:
        plan: Which keys are seen. Every query sees one near key at least.
        scale: Factor on the dot products.
        query: ``[B, Hq, T, D]``; key, value: the segment's own, ``[B, Hkv, T, D]``.
        past: Keys and values of the cache, ``[B, Hkv, N, D]``; no gradient reaches them, and they must not change
            before the backward pass.
        far: The queries as far keys want them, ``[B, Hq, T, D]``, far keys and values ``[B, Hkv, U, D]``.
        softcap: See `capped`.
        sink_logits: ``[Hq]``; see `with_sink`.

    Returns:
        ``[B, Hq, T, D]``.
    """
    far = far or (None, None, None)
    return _Blockwise.apply(plan, (scale, softcap), past, sink_logits, query, key, value, *far)


def _near_states(past: torch.Tensor | None, own: torch.Tensor, near: NearKeys) -> torch.Tensor:
    parts = [] if past is None or not near.past else [past[:, :, : near.past]]
    if near.sinks:
        parts.append(own[:, :, : near.sinks])
    block = own[:, :, near.first : near.queries.stop]
    return torch.cat([*parts, block], dim=2) if parts else block


class _Blockwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, plan, score, past, sink_logits, query, key, value, far_query, far_key, far_value):
        scale, softcap = score
        pasts = past or (None, None)
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        total = torch.empty(query.shape[:3], dtype=torch.promote_types(query.dtype, torch.float32), device=query.device)
        for near in plan.near(query):
            rows = near.queries
            keys, values = _near_states(pasts[0], key, near), _near_states(pasts[1], value, near)
            found = attend_set(query[:, :, rows], keys, values, near.bias, scale, softcap=softcap)
            if far_query is not None:
                for seen, bias in plan.far(rows, query):
                    states = far_query[:, :, rows], far_key[:, :, seen], far_value[:, :, seen]
                    found = merge(found, attend_set(*states, bias, scale, True, softcap))
            out[:, :, rows], total[:, :, rows] = with_sink(found, sink_logits)
        ctx.plan, ctx.score, ctx.past = plan, score, past
        ctx.save_for_backward(sink_logits, query, key, value, far_query, far_key, far_value, out, total)
        return out

    @staticmethod
    def backward(ctx, upstream):
        plan, score, pasts = ctx.plan, ctx.score, ctx.past or (None, None)
        sink_logits, *inputs, out, total = ctx.saved_tensors  # once: checkpoints give them a single time
        query, key, value, far_query, far_key, far_value = inputs
        grads = [None if each is None else torch.zeros_like(each) for each in inputs]
        for near in plan.near(query):
            rows = near.queries
            merged = upstream[:, :, rows], out[:, :, rows], total[:, :, rows]
            keys, values = _near_states(pasts[0], key, near), _near_states(pasts[1], value, near)
            found = _backward(query[:, :, rows], keys, values, near.bias, *score, *merged)
            grads[0][:, :, rows] = found[0]
            for grad, part in zip(grads[1:3], found[1:], strict=True):
                part = part[:, :, near.past if ctx.past is not None else 0 :]
                grad[:, :, : near.sinks] += part[:, :, : near.sinks]
                grad[:, :, near.first : rows.stop] += part[:, :, near.sinks :]
            if far_query is not None:
                for seen, bias in plan.far(rows, query):
                    states = far_query[:, :, rows], far_key[:, :, seen], far_value[:, :, seen]
                    found = _backward(*states, bias, *score, *merged)
                    grads[3][:, :, rows] += found[0]
                    grads[4][:, :, seen] += found[1]
                    grads[5][:, :, seen] += found[2]
        sink_grad = None
        if ctx.needs_input_grad[3]:
            # A key of value zero: its weight, times what every weight loses to the output's mean.
            share = (sink_logits.to(total.dtype)[:, None] - total).exp()
            sink_grad = -(share * (_precise(upstream) * out).sum(-1)).sum((0, 2)).to(sink_logits.dtype)
        return None, None, None, sink_grad, *grads


def _precise(states: torch.Tensor) -> torch.Tensor:
    return states.to(torch.promote_types(states.dtype, torch.float32))


def _backward(query, key, value, bias, scale, softcap, upstream, out, lse):
    """Gradients of query, key and value, given the output and log-sum-exp of a softmax that they are a part of."""
    heads, kv_heads = query.shape[1], key.shape[1]
    # Query heads of one key head below each other: ``[B, Hkv, groups * R, ...]``.
    query, upstream, out, lse = (
        each.unflatten(1, (kv_heads, -1)).flatten(2, 3).contiguous() for each in (query, upstream, out, lse)
    )
    if bias is not None:
        bias = bias.repeat(1, 1, heads // kv_heads, 1)
    if query.device.type == _FLASH_DEVICE and softcap is None:
        operation = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        grads = operation(upstream, query, key, value, out, lse, 0.0, False, attn_mask=bias, scale=scale)
    else:
        scores = capped(_precise(query @ key.transpose(2, 3)) * scale, softcap)
        weights = ((scores if bias is None else scores + bias) - lse[..., None]).exp()
        change = _precise(upstream @ value.transpose(2, 3)) - (_precise(upstream) * out).sum(-1, keepdim=True)
        change = weights * change * scale
        if softcap is not None:
            change = change * (1 - (scores / softcap).square())  # the derivative of tanh
        change = change.to(query.dtype)
        grads = change @ key, change.transpose(2, 3) @ query, weights.to(query.dtype).transpose(2, 3) @ upstream
    return grads[0].unflatten(2, (heads // kv_heads, -1)).flatten(1, 2), grads[1], grads[2]
