from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from photon_kernels import summary_decode_attention

BACKENDS = ["torch", "triton"]


@dataclass
class Inputs:
    q: Tensor
    k: Tensor
    v: Tensor
    lengths: Tensor
    scale: float
    unit_bias: Tensor | None = None
    rows: Tensor | None = None
    num_splits: int | None = None

    def run(self, backend: str) -> tuple[Tensor, Tensor]:
        return summary_decode_attention(**vars(self), return_lse=True, backend=backend)


def make_inputs(
    device: torch.device,
    lengths: tuple[int, ...] = (37, 12, 0),
    num_units: int = 40,
    num_heads: int = 4,
    num_kv_heads: int = 1,
    head_dim: int = 32,
    num_splits: int | None = None,
    cache_rows: int | None = None,
    bias: bool = True,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Inputs:
    """Streams with NaN wherever no query looks."""
    generator = torch.Generator().manual_seed(seed)
    cache_rows = cache_rows or len(lengths)
    shape = (cache_rows, num_kv_heads, num_units, head_dim)
    rows = torch.randperm(cache_rows, generator=generator)[: len(lengths)] if cache_rows != len(lengths) else None
    seen = torch.zeros(cache_rows, num_units, dtype=torch.bool)
    for query, length in enumerate(lengths):
        seen[query if rows is None else rows[query], :length] = True
    k, v = (torch.randn(shape, generator=generator).masked_fill(~seen[:, None, :, None], torch.nan) for _ in range(2))
    unit_bias = torch.randn(num_units, generator=generator).masked_fill(~seen.any(0), torch.nan)
    return Inputs(
        q=torch.randn(len(lengths), num_heads, head_dim, generator=generator).to(device, dtype),
        k=k.to(device, dtype),
        v=v.to(device, dtype),
        lengths=torch.tensor(lengths, dtype=torch.long, device=device),
        scale=head_dim**-0.5 * 1.3,
        unit_bias=unit_bias.to(device) if bias else None,
        rows=None if rows is None else rows.to(device),
        num_splits=num_splits,
    )


def reference(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """PyTorch's own attention in float64 on the visible units alone, query by query."""
    out = torch.zeros(inputs.q.shape, dtype=torch.float64)
    lse = torch.full(inputs.q.shape[:2], float("-inf"), dtype=torch.float64)
    group = inputs.q.shape[1] // inputs.k.shape[1]
    for query, length in enumerate(inputs.lengths.tolist()):
        if length == 0:
            continue
        row = query if inputs.rows is None else int(inputs.rows[query])
        q = inputs.q[query, :, None].double().cpu()
        k, v = (x[row][:, :length].double().cpu().repeat_interleave(group, dim=0) for x in (inputs.k, inputs.v))
        bias = torch.zeros(length) if inputs.unit_bias is None else inputs.unit_bias[:length].cpu()
        bias = bias.double()[None, :]
        out[query] = F.scaled_dot_product_attention(q[None], k[None], v[None], bias, scale=inputs.scale)[0, :, 0]
        lse[query] = torch.logsumexp((q @ k.mT)[:, 0] * inputs.scale + bias, dim=-1)
    return out, lse


def assert_matches_reference(inputs: Inputs, backend: str, tolerance: float = 2e-5) -> None:
    out, lse = inputs.run(backend)
    assert out.dtype == inputs.q.dtype and lse.dtype == torch.float32
    expected_out, expected_lse = reference(inputs)
    torch.testing.assert_close(out.double().cpu(), expected_out, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(lse.double().cpu(), expected_lse, atol=tolerance, rtol=tolerance)


SHAPES = {
    "one split": dict(num_splits=1),
    "no bias": dict(num_splits=2, bias=False),
    "group of 4, three splits": dict(num_heads=8, num_kv_heads=2, num_splits=3, num_units=203, lengths=(203, 131)),
    "group of 8, more splits than tiles": dict(num_heads=8, num_splits=7, num_units=99, lengths=(99, 64, 1)),
    "no group, head dimension 80": dict(num_heads=2, num_kv_heads=2, head_dim=80, num_splits=2, num_units=131),
    "head dimension 128": dict(head_dim=128, num_splits=2, lengths=(33,), num_units=33),
    "group of 20": dict(num_heads=20, num_splits=2),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_equals_dense_attention_over_the_visible_units(
    shape: dict[str, int], backend: str, device: torch.device
) -> None:
    assert_matches_reference(make_inputs(device, **shape), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_splits", [1, 2])
def test_half_precision(num_splits: int, dtype: torch.dtype, backend: str, device: torch.device) -> None:
    inputs = make_inputs(device, dtype=dtype, num_splits=num_splits, lengths=(150, 80), num_units=150)
    assert_matches_reference(inputs, backend, tolerance=1e-2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("num_splits", [1, 3])
def test_a_query_that_sees_nothing_gets_zero_and_minus_infinity(
    num_splits: int, backend: str, device: torch.device
) -> None:
    inputs = make_inputs(device, lengths=(0, 5), num_units=20, num_splits=num_splits)
    out, lse = inputs.run(backend)
    assert torch.equal(out[0], torch.zeros_like(out[0])) and torch.isneginf(lse[0]).all()
    assert_matches_reference(inputs, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_reads_the_given_cache_rows(backend: str, device: torch.device) -> None:
    assert_matches_reference(make_inputs(device, cache_rows=6, num_splits=2), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_need_not_be_contiguous(backend: str, device: torch.device) -> None:
    inputs = make_inputs(device, num_heads=4, num_kv_heads=2, num_splits=2)
    expected = inputs.run("torch")
    inputs.k, inputs.v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (inputs.k, inputs.v))
    inputs.q = torch.cat([inputs.q, inputs.q], dim=1)[:, :4]
    inputs.unit_bias = inputs.unit_bias.repeat_interleave(2)[::2]
    inputs.lengths = inputs.lengths.int().repeat_interleave(2)[::2]
    assert not (inputs.k.is_contiguous() or inputs.q.is_contiguous() or inputs.lengths.is_contiguous())
    torch.testing.assert_close(inputs.run(backend), expected, atol=2e-5, rtol=2e-5)
    inputs.v = inputs.v.mT.contiguous().mT
    torch.testing.assert_close(inputs.run(backend), expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [dict(lengths=()), dict(num_units=0)], ids=["no queries", "no units"])
def test_empty_inputs(shape: dict, backend: str, device: torch.device) -> None:
    inputs = make_inputs(device, **{"lengths": (0, 0), **shape})
    out, lse = inputs.run(backend)
    assert out.shape == inputs.q.shape and not out.any()
    assert lse.shape == inputs.q.shape[:2] and torch.isneginf(lse).all()


@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    group=st.sampled_from([1, 3, 4, 8]),
    num_kv_heads=st.integers(1, 2),
    head_dim=st.sampled_from([16, 24, 32]),
    lengths=st.lists(st.integers(0, 150), min_size=1, max_size=3).map(tuple),
    spare=st.integers(0, 20),
    num_splits=st.integers(1, 5),
    bias=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_shape(
    device: torch.device,
    group: int,
    num_kv_heads: int,
    head_dim: int,
    lengths: tuple[int, ...],
    spare: int,
    num_splits: int,
    bias: bool,
    seed: int,
) -> None:
    inputs = make_inputs(
        device,
        lengths=lengths,
        num_units=max(lengths) + spare,
        num_heads=group * num_kv_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        num_splits=num_splits,
        bias=bias,
        seed=seed,
    )
    for backend in BACKENDS:
        assert_matches_reference(inputs, backend)


def test_splits_are_chosen_for_few_rows_and_long_streams(device: torch.device) -> None:
    from photon_kernels.summary_decode.triton import MAX_SPLITS, choose_num_splits

    assert choose_num_splits(num_units=0, num_programs=8) == 1
    assert choose_num_splits(num_units=200, num_programs=8) == 1
    assert choose_num_splits(num_units=8192, num_programs=8) == 32
    assert choose_num_splits(num_units=8192, num_programs=64) == 5
    assert choose_num_splits(num_units=8192, num_programs=2048) == 1
    assert choose_num_splits(num_units=10**6, num_programs=1) == MAX_SPLITS


def test_the_number_of_splits_is_chosen_when_it_is_not_given(
    monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    monkeypatch.setattr("photon_kernels.summary_decode.triton.MIN_UNITS_PER_SPLIT", 16)
    assert_matches_reference(make_inputs(device, num_splits=None), "triton")


def test_wrong_shapes_are_named(device: torch.device) -> None:
    inputs = make_inputs(device)
    for change, message in [
        (dict(lengths=inputs.lengths[:2]), r"lengths must be int32 or int64 \[3\]"),
        (dict(unit_bias=inputs.unit_bias[:5]), r"unit_bias must be \[40\]"),
        (dict(num_splits=0), "num_splits must be at least 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            Inputs(**{**vars(inputs), **change}).run("torch")
