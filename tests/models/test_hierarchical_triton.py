"""One token per row by the kernels (Triton's interpreter on a CPU, or a GPU) against the torch backend."""

from __future__ import annotations

import pytest
import torch
from tiny import tokens
from tiny_hierarchical import hierarchical_model

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Groups and a bounded encoder; a stream with sinks, its slots and a top encoder of all units.
NAMES = ["block-1-window", "block-2", "stream-2-slots"]


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_kernels_decode_what_the_whole_pass_computes(name):
    model = hierarchical_model(name).to(DEVICE)
    # Long enough that units have left windows, and chunks of every level close in the few (slow) steps.
    widths, count = (9, 14), 6
    rows = [tokens(1, count + length, seed=length).to(DEVICE) for length in widths]
    expected = [model(row, use_cache=False).logits[0] for row in rows]
    prompt = torch.full((2, max(widths)), 2, device=DEVICE)
    mask = torch.zeros_like(prompt)
    for index, width in enumerate(widths):
        prompt[index, -width:], mask[index, -width:] = rows[index][0, :width], 1
    model.set_backend("triton")
    assert model.backend == "triton"
    cache = model(prompt, attention_mask=mask).past_key_values
    for step in range(count):
        column = torch.stack([row[0, width + step] for row, width in zip(rows, widths, strict=True)])
        logits = model(column[:, None], past_key_values=cache).logits[:, 0]
        for index, width in enumerate(widths):
            torch.testing.assert_close(logits[index], expected[index][width + step], atol=2e-4, rtol=0)


def test_unknown_backends_are_refused():
    model = hierarchical_model("block-1")
    with pytest.raises(ValueError, match="backend 'cuda' is not one of torch, triton"):
        model.set_backend("cuda")
    with pytest.raises(ValueError, match="fused='x' is not one of auto, yes, no"):
        model.set_fused_windows("x")
