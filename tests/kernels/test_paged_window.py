"""The paged decode attention over a window with sinks, as vLLM's blocks hold it: only what is visible has blocks."""

from __future__ import annotations

import pytest
import torch

from photon_kernels import paged_decode_attention

BACKENDS = ["torch", "triton"]
# lengths of rows, window, sinks, tokens per block, query heads, key heads, head dimension, splits, query positions
CASES = {
    "one tile": ((37, 12, 1), 9, 3, 4, 4, 2, 32, 1, 1),
    "far beyond the window": ((203, 131, 64), 40, 4, 16, 3, 1, 64, 2, 1),
    "splits of sinks alone": ((300, 40), 17, 33, 8, 8, 2, 32, 5, 1),
    "no sinks": ((90, 5), 20, 0, 16, 4, 4, 32, 3, 1),
    "window of one": ((70, 1), 1, 2, 3, 4, 1, 32, 2, 1),
    "several queries per row": ((150, 45), 30, 4, 16, 4, 2, 32, 2, 5),
    "blocks of tiles": ((200, 140), 50, 4, 64, 4, 2, 32, 2, 1),
}


def make(lengths, window, sinks, size, heads, kv_heads, dim, positions, device, dtype=torch.float32):
    """Keys and values side by side in one buffer, tokens before heads, with a gap after each block; NaN elsewhere."""
    generator = torch.Generator().manual_seed(1)
    width = -(-max(lengths) // size)
    order = 1 + torch.randperm(2 * len(lengths) * width, generator=generator)[: len(lengths) * width]
    order = order.view(len(lengths), width)
    page = size * kv_heads * 2 * dim
    buffer = torch.full((2 * len(lengths) * width + 1, page + 24), torch.nan)
    cache = buffer[:, :page].unflatten(1, (size, kv_heads, 2 * dim)).transpose(1, 2)
    tokens = torch.randn(len(lengths), max(lengths), kv_heads, 2 * dim, generator=generator)
    queries = torch.randn(len(lengths), heads, positions, dim, generator=generator)
    seen = torch.tensor(lengths)[:, None] - torch.arange(positions).flip(0)
    start = seen - window
    table = torch.zeros(len(lengths), width, dtype=torch.int32)  # block 0 is nobody's
    for row, length in enumerate(lengths):
        for token in range(length):
            if token >= int(start[row].min()) or token < sinks:
                cache[order[row, token // size], :, token % size] = tokens[row, token]
                table[row, token // size] = order[row, token // size]
    moved = buffer.to(device, dtype)
    cache = moved[:, :page].unflatten(1, (size, kv_heads, 2 * dim)).transpose(1, 2)
    inputs = {"q": queries.to(device, dtype), "k": cache[..., :dim], "v": cache[..., dim:], "seen": seen.to(device)}
    inputs |= {"start": start.to(device), "block_table": table.to(device), "num_sinks": sinks, "scale": dim**-0.5 * 1.3}
    return inputs, tokens


def reference(inputs, tokens, sinks):
    """In float64, query by query and head by head, from the tokens as they were drawn."""
    q, dim = inputs["q"].double().cpu(), inputs["q"].shape[3]
    out = torch.zeros_like(q)
    lse = torch.full(q.shape[:3], -torch.inf, dtype=torch.float64)
    for row in range(q.shape[0]):
        for head in range(q.shape[1]):
            kv_head = head * tokens.shape[2] // q.shape[1]
            for position in range(q.shape[2]):
                stop, first = int(inputs["seen"][row, position]), int(inputs["start"][row, position])
                visible = [token for token in range(stop) if token >= first or token < sinks]
                found = tokens[row, visible, kv_head].double()
                logits = found[:, :dim] @ q[row, head, position] * inputs["scale"]
                out[row, head, position] = logits.softmax(0) @ found[:, dim:]
                lse[row, head, position] = logits.logsumexp(0)
    return out, lse


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_window_with_sinks_equals_a_softmax_over_what_is_visible(case, backend, device):
    lengths, window, sinks, size, heads, kv_heads, dim, splits, positions = case
    inputs, tokens = make(lengths, window, sinks, size, heads, kv_heads, dim, positions, device)
    out, lse = paged_decode_attention(**inputs, num_splits=splits, return_lse=True, backend=backend)
    expected = reference(inputs, tokens, sinks)
    torch.testing.assert_close(out.double().cpu(), expected[0], atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(lse.double().cpu(), expected[1], atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision(backend, device):
    inputs, tokens = make((130, 40), 33, 4, 16, 4, 2, 64, 1, device, torch.bfloat16)
    out, lse = paged_decode_attention(**inputs, num_splits=2, return_lse=True, backend=backend)
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    expected = reference(inputs, tokens.bfloat16(), 4)
    torch.testing.assert_close(out.double().cpu(), expected[0], atol=3e-2, rtol=3e-2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("splits", [1, 3])
def test_without_a_window_the_log_sum_exp_is_that_of_all(splits, backend, device):
    inputs, tokens = make((60, 7), 1000, 0, 16, 4, 2, 32, 1, device)
    inputs.pop("start"), inputs.pop("num_sinks")
    out, lse = paged_decode_attention(**inputs, num_splits=splits, return_lse=True, backend=backend)
    expected = reference(inputs | {"start": torch.zeros(2, 1, dtype=torch.long)}, tokens, 0)
    torch.testing.assert_close(out.double().cpu(), expected[0], atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(lse.double().cpu(), expected[1], atol=2e-5, rtol=2e-5)


def test_wrong_windows_are_named(device):
    inputs, _ = make((9,), 4, 1, 4, 4, 2, 32, 1, device)
    with pytest.raises(ValueError, match="start must be"):
        paged_decode_attention(**inputs | {"start": inputs["start"][:, 0]})
    with pytest.raises(ValueError, match="num_sinks must not be negative"):
        paged_decode_attention(**inputs | {"num_sinks": -1})
