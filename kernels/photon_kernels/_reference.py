"""What the torch references of the decode attentions share: reading a store, and softmax over what is visible of it."""

from __future__ import annotations

import torch
from torch import Tensor


def read_rows(states: Tensor, rows: Tensor | None, block_table: Tensor | None, counts: Tensor) -> Tensor:
    """Rows of a store, ``[B, H, N, D]``.

    Args:
        states: ``[Bc, H, N, D]``; with `block_table`, ``[blocks, H, elements per block, D]``.
        rows: Integer ``[B]``, the rows to read; None: all, in order.
        block_table: Integer ``[Br, W]``, the blocks of each row.
        counts: Integer ``[B]``, elements that are wanted of each row; beyond them the table may hold anything.
    """
    if block_table is None:
        return states if rows is None else states[rows]
    block_table = block_table if rows is None else block_table[rows]
    used = torch.arange(block_table.shape[1], device=states.device) * states.shape[2] < counts[:, None]
    return states[torch.where(used, block_table, 0)].transpose(1, 2).flatten(2, 3)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of the queries of each row over the elements they may see.

    What an element holds that no query of its row sees (NaN included) has no influence. Arithmetic is in float32, or
    float64 for float64 inputs.

    Args:
        q: Queries ``[B, Hq, Q, D]``; query head ``h`` reads key head ``h // (Hq / Hkv)``.
        k: Keys ``[B, Hkv, N, D]``.
        v: Values ``[B, Hkv, N, D]``.
        visible: bool ``[B, Q, N]``.
        scale: Factor on the dot products.

    Returns:
        The output ``[B, Hq, Q, D]`` in q's dtype, and the natural logarithm of the softmax denominator ``[B, Hq, Q]``
        in the dtype of the arithmetic. A query that sees nothing gives 0 and -inf.
    """
    accumulate = torch.promote_types(q.dtype, torch.float32)
    grouped = q.to(accumulate).unflatten(1, (k.shape[1], -1))
    # Zeroed, not only masked: 0 * NaN is NaN.
    unseen = ~visible.any(dim=1)[:, None, :, None]
    keys = k.to(accumulate).masked_fill(unseen, 0.0)
    values = v.to(accumulate).masked_fill(unseen, 0.0)

    logits = torch.einsum("bhgqd,bhnd->bhgqn", grouped, keys) * scale
    logits = logits.masked_fill(~visible[:, None, None], float("-inf"))
    lse = torch.logsumexp(logits, dim=-1)
    weights = torch.exp(logits - lse.masked_fill(lse == float("-inf"), 0.0)[..., None])
    out = torch.einsum("bhgqn,bhnd->bhgqd", weights, values)
    return out.flatten(1, 2).to(q.dtype), lse.flatten(1, 2)
