from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from photon_kernels import gather_chunk_project

BACKENDS = ["torch", "triton"]


def make_inputs(
    device: torch.device,
    cache_rows: int = 5,
    chunk_size: int = 4,
    width: int = 32,
    num_outputs: int = 48,
    num_rows: int = 3,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Buffers that hold NaN in the rows whose chunk stays open."""
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(cache_rows, chunk_size, width, generator=generator)
    rows = torch.randint(0, cache_rows, (num_rows,), generator=generator)
    is_open = torch.ones(cache_rows, dtype=torch.bool)
    is_open[rows] = False
    states[is_open] = float("nan")
    weight = torch.randn(num_outputs, chunk_size * width, generator=generator) * (chunk_size * width) ** -0.5
    return states.to(device, dtype), rows.to(device), weight.to(device, dtype), torch.tensor(1.3, device=device)


def reference(states: Tensor, rows: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """The sum over the positions of the chunk, in float64, without concatenation."""
    blocks = weight.double().cpu().unflatten(1, states.shape[1:])
    picked = torch.stack([states[row].double().cpu() for row in rows.tolist()])
    return torch.einsum("ncd,ocd->no", picked, blocks) * float(scale)


def assert_matches_reference(inputs: tuple[Tensor, ...], backend: str, tolerance: float = 2e-5) -> None:
    out = gather_chunk_project(*inputs, backend=backend)
    assert out.dtype == inputs[0].dtype
    torch.testing.assert_close(out.double().cpu(), reference(*inputs), atol=tolerance, rtol=tolerance)


SHAPES = {
    "width 32": dict(),
    "one row": dict(num_rows=1, chunk_size=2),
    "odd sizes": dict(width=37, num_outputs=45, chunk_size=3, num_rows=7),
    "chunk of one": dict(chunk_size=1, width=16, num_outputs=16),
    "state of several tiles": dict(width=200, num_outputs=70),
    "more rows than a tile": dict(num_rows=70, num_outputs=65, cache_rows=80),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_equals_the_sum_over_positions(shape: dict[str, int], backend: str, device: torch.device) -> None:
    assert_matches_reference(make_inputs(device, **shape), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype, backend: str, device: torch.device) -> None:
    states, rows, weight, scale = make_inputs(device, dtype=dtype, width=80)
    assert_matches_reference((states, rows, weight, scale), backend, tolerance=2e-2)
    assert_matches_reference((states, rows, weight, scale.to(dtype)), backend, tolerance=2e-2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_need_not_be_contiguous(backend: str, device: torch.device) -> None:
    states, rows, weight, scale = make_inputs(device)
    expected = reference(states, rows, weight, scale).float()
    by_position = states.transpose(0, 1).contiguous().transpose(0, 1)
    wide = torch.cat([weight, weight], dim=1)[:, : weight.shape[1]]
    strided_rows = rows.int().repeat_interleave(2)[::2]
    for variant in [
        (by_position, rows, wide, scale),
        (states, strided_rows, weight.T.contiguous().T, scale.reshape(1)),
        (states.mT.contiguous().mT, rows, weight, scale),
    ]:
        assert not all(tensor.is_contiguous() for tensor in variant)
        torch.testing.assert_close(
            gather_chunk_project(*variant, backend=backend).cpu(), expected, atol=2e-5, rtol=2e-5
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_closing_chunk_gives_an_empty_result(backend: str, device: torch.device) -> None:
    states, rows, weight, scale = make_inputs(device)
    assert gather_chunk_project(states, rows[:0], weight, scale, backend=backend).shape == (0, 48)


@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    chunk_size=st.integers(1, 5),
    width=st.integers(1, 90),
    num_outputs=st.integers(1, 90),
    num_rows=st.integers(1, 40),
    seed=st.integers(0, 1000),
)
def test_any_shape(
    device: torch.device, chunk_size: int, width: int, num_outputs: int, num_rows: int, seed: int
) -> None:
    inputs = make_inputs(
        device, chunk_size=chunk_size, width=width, num_outputs=num_outputs, num_rows=num_rows, seed=seed
    )
    for backend in BACKENDS:
        assert_matches_reference(inputs, backend)


def test_wrong_shapes_are_named(device: torch.device) -> None:
    states, rows, weight, scale = make_inputs(device)
    for inputs, message in [
        ((states, rows, weight[:, 1:], scale), r"weight \[d_out, C \* d\]"),
        ((states.double(), rows, weight, scale), "one dtype"),
        ((states, rows.float(), weight, scale), "rows must be int32 or int64"),
        ((states, rows, weight, weight[0]), "scale must be a single number"),
    ]:
        with pytest.raises(ValueError, match=message):
            gather_chunk_project(*inputs)
