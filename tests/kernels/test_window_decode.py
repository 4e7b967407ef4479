from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from photon_kernels import window_decode_attention

BACKENDS = ["torch", "triton"]


@dataclass
class Inputs:
    q: Tensor
    k: Tensor
    v: Tensor
    index: Tensor
    first_visible: Tensor
    last_visible: Tensor
    scale: float
    num_sinks: int = 0
    rows: Tensor | None = None

    def visible_slots(self, query: int, position: int) -> list[int]:
        """Indices of the slots that a query sees, from the definition, one by one."""
        row = query if self.rows is None else int(self.rows[query])
        first, last = int(self.first_visible[query]), int(self.last_visible[query, position])
        return [
            slot
            for slot, held in enumerate(self.index[row].tolist())
            if held != -1 and held <= last and (held >= first or slot < self.num_sinks)
        ]

    def run(self, backend: str) -> tuple[Tensor, Tensor]:
        return window_decode_attention(**vars(self), return_lse=True, backend=backend)


def make_inputs(
    device: torch.device,
    batch: int = 3,
    num_heads: int = 4,
    num_kv_heads: int = 1,
    head_dim: int = 32,
    num_slots: int = 37,
    num_sinks: int = 2,
    window: int = 20,
    num_positions: int = 1,
    cache_rows: int | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Inputs:
    """A ring buffer in random order, with empty slots, sinks (indices 0, 1, ...) and a window that hides some indices.

    Entries that no query sees hold NaN.
    """
    generator = torch.Generator().manual_seed(seed)
    cache_rows = cache_rows or batch
    shape = (cache_rows, num_kv_heads, num_slots, head_dim)
    index = torch.full((cache_rows, num_slots), -1)
    num_sinks = min(num_sinks, num_slots)
    for row in range(cache_rows):
        index[row, :num_sinks] = torch.arange(num_sinks)
        indices = num_sinks + torch.randperm(2 * num_slots, generator=generator)[: num_slots - num_sinks]
        index[row, num_sinks:] = torch.where(torch.rand(indices.shape, generator=generator) < 0.2, -1, indices)
    last_visible = torch.randint(num_sinks, 2 * num_slots + 1, (batch, num_positions), generator=generator)
    rows = torch.randperm(cache_rows, generator=generator)[:batch] if cache_rows != batch else None
    inputs = Inputs(
        q=torch.randn(batch, num_heads, num_positions, head_dim, generator=generator),
        k=torch.randn(shape, generator=generator),
        v=torch.randn(shape, generator=generator),
        index=index,
        first_visible=last_visible[:, 0] - window + 1,
        last_visible=last_visible,
        scale=head_dim**-0.5 * 1.7,
        num_sinks=num_sinks,
        rows=rows,
    )
    seen = torch.zeros(cache_rows, num_slots, dtype=torch.bool)
    for query in range(batch):
        for position in range(num_positions):
            seen[query if rows is None else rows[query], inputs.visible_slots(query, position)] = True
    for cache in (inputs.k, inputs.v):
        cache.masked_fill_(~seen[:, None, :, None], float("nan"))
    for name in ("q", "k", "v"):
        setattr(inputs, name, getattr(inputs, name).to(device, dtype))
    for name in ("index", "first_visible", "last_visible", "rows"):
        if getattr(inputs, name) is not None:
            setattr(inputs, name, getattr(inputs, name).to(device))
    return inputs


def reference(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """PyTorch's own attention in float64 on the visible slots alone, query by query."""
    out = torch.zeros(inputs.q.shape, dtype=torch.float64)
    lse = torch.full(inputs.q.shape[:3], float("-inf"), dtype=torch.float64)
    group = inputs.q.shape[1] // inputs.k.shape[1]
    for query, position in itertools.product(range(inputs.q.shape[0]), range(inputs.q.shape[2])):
        slots = inputs.visible_slots(query, position)
        if not slots:
            continue
        row = query if inputs.rows is None else int(inputs.rows[query])
        q = inputs.q[query, :, position, None].double().cpu()
        k, v = (x[row][:, slots].double().cpu().repeat_interleave(group, dim=0) for x in (inputs.k, inputs.v))
        out[query, :, position] = F.scaled_dot_product_attention(q[None], k[None], v[None], scale=inputs.scale)[0, :, 0]
        lse[query, :, position] = torch.logsumexp((q @ k.mT)[:, 0] * inputs.scale, dim=-1)
    return out, lse


def assert_matches_reference(inputs: Inputs, backend: str, tolerance: float = 2e-5) -> None:
    out, lse = inputs.run(backend)
    assert out.dtype == inputs.q.dtype and lse.dtype == torch.float32
    expected_out, expected_lse = reference(inputs)
    torch.testing.assert_close(out.double().cpu(), expected_out, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(lse.double().cpu(), expected_lse, atol=tolerance, rtol=tolerance)


SHAPES = {
    "tiny chunk, R + C = 8": dict(num_heads=4, num_kv_heads=4, head_dim=16, num_slots=8, num_sinks=0, window=99),
    "R + C = 72, group of 4": dict(num_heads=8, num_kv_heads=2, num_slots=72, num_sinks=0, window=999),
    "ring of 133, group of 8": dict(num_heads=8, num_kv_heads=1, head_dim=64, num_slots=133, window=100),
    "head dimension 80": dict(num_heads=2, num_kv_heads=2, head_dim=80, num_slots=65),
    "head dimension 128": dict(head_dim=128, num_slots=33, num_sinks=4),
    "group of 20": dict(num_heads=20, num_kv_heads=1, num_slots=19),
    "one slot": dict(num_slots=1, num_sinks=0, window=3),
    "four slots, group of 4": dict(num_heads=8, num_kv_heads=2, num_slots=20, num_positions=4),
    "nine positions, group of 8": dict(num_heads=8, num_kv_heads=1, num_slots=35, num_positions=9, num_sinks=0),
    "more sinks than the window": dict(num_slots=30, num_sinks=9, window=2),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_equals_dense_attention_over_the_visible_slots(
    shape: dict[str, int], backend: str, device: torch.device
) -> None:
    assert_matches_reference(make_inputs(device, **shape), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype, backend: str, device: torch.device) -> None:
    assert_matches_reference(make_inputs(device, dtype=dtype, num_slots=70), backend, tolerance=1e-2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_query_that_sees_nothing_gets_zero_and_minus_infinity(backend: str, device: torch.device) -> None:
    inputs = make_inputs(device, num_sinks=0)
    inputs.index[1] = -1
    inputs.last_visible[2] = -5
    for cache in (inputs.k, inputs.v):
        cache[1:] = float("nan")
    out, lse = inputs.run(backend)
    assert torch.equal(out[1:], torch.zeros_like(out[1:]))
    assert torch.isneginf(lse[1:]).all()
    assert_matches_reference(inputs, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sinks_are_the_first_slots_whatever_they_hold(backend: str, device: torch.device) -> None:
    """An element of a sink's number that lies in another slot is too old; one of another number in a sink's is seen."""
    inputs = make_inputs(device, num_sinks=2)
    inputs.index[:, :2], inputs.index[:, 5:7] = torch.tensor([3, 2]), torch.tensor([0, 1])
    inputs.first_visible[:] = 20
    inputs.k, inputs.v = (states.nan_to_num(9.0) for states in (inputs.k, inputs.v))
    assert_matches_reference(inputs, backend)


def test_what_no_query_sees_reaches_no_gradient(device: torch.device) -> None:
    """The torch backend's gradients of queries, keys and values, where unseen slots hold NaN, are those of zeros."""
    found = []
    for filled in (float("nan"), 0.0):
        inputs = make_inputs(device, num_heads=4, num_kv_heads=2)
        leaves = [inputs.q, *(states.nan_to_num(filled) for states in (inputs.k, inputs.v))]
        inputs.q, inputs.k, inputs.v = (states.requires_grad_() for states in leaves)
        out, lse = inputs.run("torch")
        found.append(torch.autograd.grad(out.square().sum() + lse.sum(), leaves))
    for gradient, expected in zip(*found, strict=True):
        assert expected.any()
        torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_reads_the_given_cache_rows(backend: str, device: torch.device) -> None:
    inputs = make_inputs(device, batch=3, cache_rows=7)
    assert_matches_reference(inputs, backend)
    # Several continuations of one prompt read the same row.
    shared = make_inputs(device, batch=1)
    first, last = shared.first_visible.repeat(3), shared.last_visible.repeat(3, 1)
    rows = torch.zeros(3, dtype=torch.int32, device=device)
    shared = replace(shared, q=shared.q.repeat(3, 1, 1, 1) * 0.7, first_visible=first, last_visible=last, rows=rows)
    assert_matches_reference(shared, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_need_not_be_contiguous(backend: str, device: torch.device) -> None:
    inputs = make_inputs(device, num_heads=4, num_kv_heads=2)
    expected = inputs.run("torch")
    # Token-major caches, as a projection writes them, and queries cut out of a joint projection.
    inputs.k, inputs.v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (inputs.k, inputs.v))
    inputs.q = torch.cat([inputs.q, inputs.q], dim=1)[:, :4]
    inputs.index = torch.cat([inputs.index, inputs.index], dim=1)[:, : inputs.index.shape[1]]
    inputs.first_visible = inputs.first_visible.repeat_interleave(2)[::2]
    assert not (inputs.k.is_contiguous() or inputs.q.is_contiguous() or inputs.first_visible.is_contiguous())
    torch.testing.assert_close(inputs.run(backend), expected, atol=2e-5, rtol=2e-5)
    # Even the last dimension may be strided.
    inputs.k, inputs.q = (x.mT.contiguous().mT for x in (inputs.k, inputs.q))
    torch.testing.assert_close(inputs.run(backend), expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_32_bit_indices_and_no_lse(backend: str, device: torch.device) -> None:
    inputs = make_inputs(device)
    expected, _ = inputs.run(backend)
    for name in ("index", "first_visible", "last_visible"):
        setattr(inputs, name, getattr(inputs, name).int())
    assert torch.equal(window_decode_attention(**vars(inputs), backend=backend), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_logits_do_not_overflow(backend: str, device: torch.device) -> None:
    inputs = make_inputs(device)
    inputs.scale = 40.0
    assert_matches_reference(inputs, backend, tolerance=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [dict(batch=0), dict(num_slots=0)], ids=["no queries", "no slots"])
def test_empty_inputs(shape: dict[str, int], backend: str, device: torch.device) -> None:
    sizes = {"batch": 2, "num_slots": 5, **shape}
    index = torch.zeros(sizes["batch"], dtype=torch.long, device=device)
    q = torch.ones(sizes["batch"], 4, 1, 16, device=device)
    cache = torch.ones(sizes["batch"], 2, sizes["num_slots"], 16, device=device)
    stored = torch.zeros(sizes["batch"], sizes["num_slots"], dtype=torch.long, device=device)
    out, lse = window_decode_attention(
        q, cache, cache, stored, index, index[:, None], 1.0, return_lse=True, backend=backend
    )
    assert out.shape == q.shape and lse.shape == q.shape[:3]
    if sizes["num_slots"] == 0:
        assert not out.any() and torch.isneginf(lse).all()


@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    group=st.sampled_from([1, 3, 4, 8]),
    num_kv_heads=st.integers(1, 2),
    head_dim=st.sampled_from([16, 24, 32, 48]),
    num_slots=st.integers(1, 140),
    num_sinks=st.integers(0, 5),
    window=st.integers(1, 150),
    num_positions=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
def test_any_shape(
    device: torch.device,
    group: int,
    num_kv_heads: int,
    head_dim: int,
    num_slots: int,
    num_sinks: int,
    window: int,
    num_positions: int,
    seed: int,
) -> None:
    inputs = make_inputs(
        device,
        batch=2,
        num_heads=group * num_kv_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        num_slots=num_slots,
        num_sinks=num_sinks,
        window=window,
        num_positions=num_positions,
        cache_rows=2 + seed % 2,
        seed=seed,
    )
    for backend in BACKENDS:
        assert_matches_reference(inputs, backend)


def test_wrong_shapes_are_named(device: torch.device) -> None:
    inputs = make_inputs(device, num_heads=4, num_kv_heads=2)
    for change, message in [
        (dict(q=inputs.q[..., :16]), "head dimension 16, the cache has 32"),
        (dict(q=inputs.q[:, :3]), "3 query heads cannot be shared out over 2"),
        (dict(q=inputs.q.double()), "one dtype"),
        (dict(v=inputs.v[:, :, 1:]), r"expected q \[B, Hq, Q, D\]"),
        (dict(index=inputs.index[:, 1:]), r"index must be int32 or int64 \[3, 37\]"),
        (dict(q=inputs.q[:2]), "2 rows of queries, but 3 cache rows"),
        (dict(last_visible=inputs.last_visible[:1]), r"last_visible must be int32 or int64 \[3, 1\]"),
        (dict(first_visible=inputs.first_visible.float()), "first_visible must be int32 or int64"),
        (dict(rows=torch.zeros(2, dtype=torch.long)), r"rows must be int32 or int64 \[3\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            replace(inputs, **change).run("torch")
