"""Accuracy on a GPU: the error of bfloat16 against float64, which only rounding may explain."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from photon_kernels import (
    Append,
    cache_append,
    gather_chunk_project,
    latent_decode,
    paged_decode_attention,
    window_decode_attention,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
# Relative to the size of the result. Rounding to bfloat16 alone gives about 2e-3; tf32 products would give 5e-4.
TOLERANCES = {torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float32: 1e-5}


def relative_error(result: Tensor, expected: Tensor) -> float:
    return float((result.double() - expected).norm() / expected.norm())


def random(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.float32).to(dtype)


HEADS = [(32, 8, 64), (32, 8, 128), (64, 8, 128), (16, 16, 80)]


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("num_slots, positions", [(8, 1), (72, 4), (300, 1)])
def test_window_decode(num_slots: int, positions: int, heads: tuple[int, int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    num_heads, num_kv_heads, head_dim = heads
    q = random(64, num_heads, positions, head_dim, dtype=dtype)
    k, v = random(2, 64, num_kv_heads, num_slots, head_dim, dtype=dtype)
    index = torch.stack([torch.randperm(num_slots, device="cuda") for _ in range(64)])
    last = torch.randint(0, num_slots, (64, 1), device="cuda") + torch.arange(positions, device="cuda")
    arguments = index, last[:, 0] - 64, last, head_dim**-0.5, 4
    expected, expected_lse = window_decode_attention(q.double(), k.double(), v.double(), *arguments, return_lse=True)
    out, lse = window_decode_attention(q, k, v, *arguments, return_lse=True, backend="triton")
    assert relative_error(out, expected) < TOLERANCES[dtype]
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("block_size", [None, 16, 64])
@pytest.mark.parametrize("batch, capacity, positions", [(1, 8192, 1), (4, 2048, 3), (64, 256, 1)])
def test_paged_decode(
    batch: int, capacity: int, positions: int, block_size: int | None, heads: tuple[int, int, int], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    num_heads, num_kv_heads, head_dim = heads
    q = random(batch, num_heads, positions, head_dim, dtype=dtype)
    block_table, blocks, per_block = None, batch, capacity
    if block_size:
        blocks, per_block = batch * capacity // block_size, block_size
        block_table = torch.randperm(blocks, device="cuda").view(batch, -1)
    k, v = random(2, blocks, num_kv_heads, per_block, head_dim, dtype=dtype)
    arguments = torch.randint(1, capacity + 1, (batch, positions), device="cuda"), head_dim**-0.5, None, block_table
    expected = paged_decode_attention(q.double(), k.double(), v.double(), *arguments)
    out = paged_decode_attention(q, k, v, *arguments, backend="triton")
    assert relative_error(out, expected) < TOLERANCES[dtype]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("heads", HEADS[:2], ids=str)
@pytest.mark.parametrize("block_size, num_latents", [(None, 1), (64, 1), (64, 2)])
@pytest.mark.parametrize("batch, num_units", [(1, 8192), (32, 300)])
def test_latent_decode(
    batch: int,
    num_units: int,
    block_size: int | None,
    num_latents: int,
    heads: tuple[int, int, int],
    dtype: torch.dtype,
) -> None:
    torch.manual_seed(0)
    num_heads, num_kv_heads, head_dim = heads
    width = 2 * num_kv_heads * head_dim // num_latents
    folded = random(batch, num_heads, 4, width, dtype=dtype) * width**-0.5
    block_table, blocks, per_block = None, batch, num_units
    if block_size:
        blocks, per_block = batch * -(-num_units // block_size), block_size
        block_table = torch.randperm(blocks, device="cuda").view(batch, -1)
    keys, values = random(2, blocks, num_kv_heads, per_block, head_dim, dtype=dtype)
    visible = torch.randint(1, num_units + 1, (batch,), device="cuda")
    arguments = visible, 1.5, 4, None, block_table
    bias = torch.randn(batch, num_heads, 4, device="cuda")
    expected = latent_decode(folded.double(), bias.double(), keys.double(), values.double(), *arguments)
    found = latent_decode(folded, bias, keys, values, *arguments, backend="triton")
    assert relative_error(found.mixed, expected.mixed) < TOLERANCES[dtype]
    torch.testing.assert_close(found.mass.double(), expected.mass, atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(found.lse.double(), expected.lse, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("num_rows, width", [(1, 2048), (33, 320), (256, 4096)])
def test_chunker(num_rows: int, width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    states = random(300, 4, width, dtype=dtype)
    weight = random(width, 4 * width, dtype=dtype) * (4 * width) ** -0.5
    rows = torch.randint(0, 300, (num_rows,), device="cuda")
    scale = torch.tensor(1.3, device="cuda")
    expected = gather_chunk_project(states.double(), rows, weight.double(), scale)
    out = gather_chunk_project(states, rows, weight, scale, backend="triton")
    assert relative_error(out, expected) < TOLERANCES[dtype]


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("block_size", [None, 16])
def test_cache_append(block_size: int | None, dtype: torch.dtype) -> None:
    """Tokens of four positions, units of which two in three are skipped, and an open chunk's states; bit by bit."""
    torch.manual_seed(0)
    batch, size = 64, 96
    rows = torch.randperm(batch, device="cuda")
    block_table = torch.randperm(batch * size // block_size, device="cuda").view(batch, -1) if block_size else None
    appends = []
    for heads, head_dim, positions in ((8, 128, 4), (8, 128, 1), (1, 4096, 1)):
        slots = torch.stack([torch.randperm(size, device="cuda")[:positions] for _ in range(batch)])
        if positions == 1:
            slots = slots.where(torch.rand(batch, 1, device="cuda") < 0.3, -1)
        blocks, per_block = (batch * size // block_size, block_size) if block_size else (batch, size)
        target = torch.zeros(blocks, heads, per_block, head_dim, device="cuda", dtype=dtype)
        appends.append(Append(random(batch, heads, positions, head_dim, dtype=dtype), target, rows, slots, block_table))
    expected = [append._replace(target=append.target.clone()) for append in appends]
    cache_append(expected)
    cache_append(appends, backend="triton")
    for append, other in zip(appends, expected, strict=True):
        assert torch.equal(append.target, other.target)
