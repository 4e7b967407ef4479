"""Join attention over two sets of entries into attention over their union."""

from __future__ import annotations

import torch
from torch import Tensor


def merge_attention(
    first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor], return_lse: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """One softmax from two partial ones over disjoint entries (exact up to rounding).

    Args:
        first: Output ``[..., D]`` and natural log-sum-exp ``[...]`` of the first part.
        second: The same of the second part.
        return_lse: Return the log-sum-exp of the union too.

    Returns:
        The output ``[..., D]`` in the first part's dtype, and float32 ``[...]`` if ``return_lse``. A part that saw
        nothing (log-sum-exp -inf) leaves the other one as it is; two such parts give 0 and -inf.
    """
    (first_out, first_lse), (second_out, second_lse) = first, second
    accumulate = torch.promote_types(first_out.dtype, torch.float32)
    first_lse, second_lse = first_lse.to(accumulate), second_lse.to(accumulate)
    lse = torch.logaddexp(first_lse, second_lse)
    shift = lse.masked_fill(lse == float("-inf"), 0.0)
    merged = torch.exp(first_lse - shift)[..., None] * first_out.to(accumulate)
    merged = merged + torch.exp(second_lse - shift)[..., None] * second_out.to(accumulate)
    merged = merged.to(first_out.dtype)
    return (merged, lse) if return_lse else merged
