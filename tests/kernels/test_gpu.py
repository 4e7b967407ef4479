"""Accuracy on a GPU: the error of bfloat16 against float64, which only rounding may explain."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from photon_kernels import gather_chunk_project, summary_decode_attention, window_decode_attention

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


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("heads", [(32, 8, 64), (32, 8, 128), (64, 8, 128), (16, 16, 80)], ids=str)
@pytest.mark.parametrize("num_entries", [8, 72, 300])
def test_window_decode(num_entries: int, heads: tuple[int, int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    num_heads, num_kv_heads, head_dim = heads
    q = random(64, num_heads, head_dim, dtype=dtype)
    k, v = random(2, 64, num_kv_heads, num_entries, head_dim, dtype=dtype)
    order = torch.stack([torch.randperm(num_entries, device="cuda") for _ in range(64)])
    last = torch.randint(0, num_entries, (64,), device="cuda")
    arguments = order, last - 64, last, head_dim**-0.5, 4
    expected, expected_lse = window_decode_attention(q.double(), k.double(), v.double(), *arguments, return_lse=True)
    out, lse = window_decode_attention(q, k, v, *arguments, return_lse=True, backend="triton")
    assert relative_error(out, expected) < TOLERANCES[dtype]
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("heads", [(32, 8, 64), (32, 8, 128), (64, 8, 128), (16, 16, 80)], ids=str)
@pytest.mark.parametrize("batch, num_units", [(1, 8191), (4, 2048), (64, 257)])
def test_summary_decode(batch: int, num_units: int, heads: tuple[int, int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    num_heads, num_kv_heads, head_dim = heads
    q = random(batch, num_heads, head_dim, dtype=dtype)
    k, v = random(2, batch, num_kv_heads, num_units, head_dim, dtype=dtype)
    lengths = torch.randint(1, num_units + 1, (batch,), device="cuda")
    bias = torch.randn(num_units, device="cuda")
    arguments = lengths, head_dim**-0.5, bias
    expected, expected_lse = summary_decode_attention(q.double(), k.double(), v.double(), *arguments, return_lse=True)
    out, lse = summary_decode_attention(q, k, v, *arguments, return_lse=True, backend="triton")
    assert relative_error(out, expected) < TOLERANCES[dtype]
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-3, rtol=1e-3)


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
