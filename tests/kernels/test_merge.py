from __future__ import annotations

import pytest
import torch

from photon_kernels import merge_attention, summary_decode_attention, window_decode_attention


@pytest.mark.parametrize("cut", [0, 1, 17, 40])
def test_merging_two_parts_equals_attention_over_their_union(cut: int) -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(3, 4, 16, generator=generator)
    k, v = torch.randn(2, 3, 2, 40, 16, generator=generator)
    order = torch.arange(cut, 40).expand(3, -1)
    first, last = torch.zeros(3, dtype=torch.long), torch.tensor([39, 20, 0])
    far = summary_decode_attention(q, k, v, last.add(1).clamp(max=cut), 0.5, return_lse=True)
    near = window_decode_attention(q, k[:, :, cut:], v[:, :, cut:], order, first, last, 0.5, return_lse=True)
    expected = summary_decode_attention(q, k, v, last + 1, 0.5, return_lse=True)
    torch.testing.assert_close(merge_attention(far, near, return_lse=True), expected, atol=2e-6, rtol=2e-6)
    torch.testing.assert_close(merge_attention(near, far), expected[0], atol=2e-6, rtol=2e-6)


def test_parts_that_saw_nothing() -> None:
    out, lse = torch.randn(2, 3, 8), torch.randn(2, 3)
    nothing = torch.zeros_like(out), torch.full_like(lse, float("-inf"))
    for merged in (merge_attention((out, lse), nothing, True), merge_attention(nothing, (out, lse), True)):
        torch.testing.assert_close(merged, (out, lse))
    merged_out, merged_lse = merge_attention(nothing, nothing, return_lse=True)
    assert torch.equal(merged_out, nothing[0]) and torch.equal(merged_lse, nothing[1])


def test_keeps_the_dtype_of_the_output() -> None:
    part = torch.randn(2, 3, 8).bfloat16(), torch.randn(2, 3) * 100
    merged, lse = merge_attention(part, part, return_lse=True)
    assert merged.dtype == torch.bfloat16 and lse.dtype == torch.float32
    torch.testing.assert_close(merged, part[0])
