from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from photon_kernels import paged_decode_attention

BACKENDS = ["torch", "triton"]


@dataclass
class Inputs:
    q: Tensor
    k: Tensor
    v: Tensor
    seen: Tensor
    scale: float
    rows: Tensor | None = None
    block_table: Tensor | None = None
    num_splits: int | None = None

    def run(self, backend: str) -> Tensor:
        return paged_decode_attention(**vars(self), backend=backend)

    def cache_row(self, query: int) -> int:
        return query if self.rows is None else int(self.rows[query])


def make_inputs(
    device: torch.device,
    seen: tuple[int, ...] = (37, 12, 0),
    capacity: int = 40,
    num_heads: int = 4,
    num_kv_heads: int = 1,
    head_dim: int = 32,
    num_positions: int = 1,
    num_splits: int | None = None,
    cache_rows: int | None = None,
    per_block: int | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Inputs:
    """Stores with NaN wherever no query looks; with `per_block` in shuffled blocks.

    The row's last query sees `seen` elements, each before it one less.
    """
    generator = torch.Generator().manual_seed(seed)
    cache_rows = cache_rows or len(seen)
    shape = (cache_rows, num_kv_heads, capacity, head_dim)
    rows = torch.randperm(cache_rows, generator=generator)[: len(seen)] if cache_rows != len(seen) else None
    inputs = Inputs(
        q=torch.randn(len(seen), num_heads, num_positions, head_dim, generator=generator),
        k=torch.randn(shape, generator=generator),
        v=torch.randn(shape, generator=generator),
        seen=(torch.tensor(seen).long()[:, None] - torch.arange(num_positions).flip(0)).clamp(min=0),
        scale=head_dim**-0.5 * 1.3,
        rows=rows,
        num_splits=num_splits,
    )
    hidden = torch.ones(cache_rows, capacity, dtype=torch.bool)
    for query, count in enumerate(seen):
        hidden[inputs.cache_row(query), :count] = False
    for states in (inputs.k, inputs.v):
        states.masked_fill_(hidden[:, None, :, None], torch.nan)
    if per_block:
        _to_blocks(inputs, per_block, generator)
    for name, value in vars(inputs).items():
        if isinstance(value, Tensor):
            setattr(inputs, name, value.to(device, dtype if value.is_floating_point() else value.dtype))
    return inputs


def _to_blocks(inputs: Inputs, per_block: int, generator: torch.Generator) -> None:
    """Move the stores into blocks that lie in random order among blocks of NaN; unused table entries are wild."""
    cache_rows, heads, capacity, dim = inputs.k.shape
    width = -(-capacity // per_block)
    order = torch.randperm(2 * cache_rows * width, generator=generator)[: cache_rows * width].view(cache_rows, width)
    for name in ("k", "v"):
        padded = torch.nn.functional.pad(
            getattr(inputs, name), (0, 0, 0, width * per_block - capacity), value=torch.nan
        )
        blocks = torch.full((2 * cache_rows * width, heads, per_block, dim), torch.nan)
        blocks[order] = padded.unflatten(2, (width, per_block)).transpose(1, 2)
        setattr(inputs, name, blocks)
    inputs.block_table = torch.full_like(order, 10**12)
    for query in range(inputs.q.shape[0]):
        row, used = inputs.cache_row(query), -(-int(inputs.seen[query].max()) // per_block)
        inputs.block_table[row, :used] = order[row, :used]


def reference(inputs: Inputs) -> Tensor:
    """Softmax in float64 over what each query sees and nothing else, query by query and head by head."""
    out = torch.zeros(inputs.q.shape, dtype=torch.float64)
    group = inputs.q.shape[1] // inputs.k.shape[1]
    for query, head, position in itertools.product(*map(range, inputs.q.shape[:3])):
        row, stored = inputs.cache_row(query), []
        for states in (inputs.k, inputs.v):
            where = [(row, element) for element in range(int(inputs.seen[query, position]))]
            if inputs.block_table is not None:
                per_block = states.shape[2]
                where = [(int(inputs.block_table[row, n // per_block]), n % per_block) for _, n in where]
            stored.append([states[block, head // group, slot].double().cpu() for block, slot in where])
        if not stored[0]:
            continue
        keys, values = map(torch.stack, stored)
        weights = torch.softmax(keys @ inputs.q[query, head, position].double().cpu() * inputs.scale, dim=0)
        out[query, head, position] = weights @ values
    return out


def assert_matches_reference(inputs: Inputs, backend: str, tolerance: float = 2e-5) -> None:
    out = inputs.run(backend)
    assert out.dtype == inputs.q.dtype
    torch.testing.assert_close(out.double().cpu(), reference(inputs), atol=tolerance, rtol=tolerance)


SHAPES = {
    "one split": dict(num_splits=1),
    "two splits": dict(num_splits=2),
    "group of 4, three splits": dict(num_heads=8, num_kv_heads=2, num_splits=3, capacity=203, seen=(203, 131)),
    "group of 8, more splits than tiles": dict(num_heads=8, num_splits=7, capacity=99, seen=(99, 64, 1)),
    "no group, head dimension 80": dict(num_heads=2, num_kv_heads=2, head_dim=80, num_splits=2, capacity=131),
    "head dimension 128": dict(head_dim=128, num_splits=2, seen=(33,), capacity=33),
    "group of 20": dict(num_heads=20, num_splits=2),
    "blocks shorter than a tile": dict(per_block=3, seen=(37, 12, 1), num_splits=2, num_heads=8, num_kv_heads=2),
    "blocks of whole tiles": dict(per_block=32, seen=(70, 33), capacity=70, num_splits=2),
    "blocks, three splits": dict(per_block=5, num_splits=3, capacity=60, seen=(60, 33, 0)),
    "positions": dict(num_positions=3, num_splits=2, num_heads=8, num_kv_heads=2),
    "positions of several tiles, in blocks": dict(num_positions=9, num_heads=8, seen=(40, 12), per_block=8),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_equals_a_softmax_over_what_is_seen(shape: dict[str, int], backend: str, device: torch.device) -> None:
    assert_matches_reference(make_inputs(device, **shape), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_splits", [1, 2])
def test_half_precision(num_splits: int, dtype: torch.dtype, backend: str, device: torch.device) -> None:
    inputs = make_inputs(device, dtype=dtype, num_splits=num_splits, seen=(70, 50), capacity=70, per_block=16)
    assert_matches_reference(inputs, backend, tolerance=1e-2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("num_splits", [1, 3])
def test_a_query_that_sees_nothing_gets_zero(num_splits: int, backend: str, device: torch.device) -> None:
    inputs = make_inputs(device, seen=(0, 5), capacity=20, num_splits=num_splits)
    out = inputs.run(backend)
    assert torch.equal(out[0], torch.zeros_like(out[0])) and out[1].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_reads_the_given_cache_rows(backend: str, device: torch.device) -> None:
    inputs = make_inputs(device, cache_rows=6, num_splits=2, per_block=8)
    assert_matches_reference(inputs, backend)
    # A row may be read twice: a batch is filled up with its last row.
    twice = torch.tensor([0, 1, 2, 0], device=device)
    inputs = replace(inputs, q=inputs.q[twice] * 0.7, seen=inputs.seen[twice], rows=inputs.rows[twice].int())
    assert_matches_reference(inputs, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_need_not_be_contiguous(backend: str, device: torch.device) -> None:
    inputs = make_inputs(device, num_heads=4, num_kv_heads=2, num_splits=2, per_block=16)
    expected = inputs.run("torch")
    inputs.k, inputs.v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (inputs.k, inputs.v))
    inputs.q = torch.cat([inputs.q, inputs.q], dim=1)[:, :4]
    inputs.seen = inputs.seen.int().repeat_interleave(2, dim=0)[::2]
    inputs.block_table = torch.cat([inputs.block_table, inputs.block_table], dim=1)[:, : inputs.block_table.shape[1]]
    assert not (inputs.k.is_contiguous() or inputs.q.is_contiguous() or inputs.seen.is_contiguous())
    torch.testing.assert_close(inputs.run(backend), expected, atol=2e-5, rtol=2e-5)
    inputs.v = inputs.v.mT.contiguous().mT
    torch.testing.assert_close(inputs.run(backend), expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [dict(seen=()), dict(capacity=0)], ids=["no queries", "nothing stored"])
def test_empty_inputs(shape: dict, backend: str, device: torch.device) -> None:
    inputs = make_inputs(device, **{"seen": (0, 0), **shape})
    out = inputs.run(backend)
    assert out.shape == inputs.q.shape and not out.any()


@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    group=st.sampled_from([1, 3, 4, 8]),
    num_kv_heads=st.integers(1, 2),
    head_dim=st.sampled_from([16, 24, 32]),
    seen=st.lists(st.integers(0, 100), min_size=1, max_size=3).map(tuple),
    spare=st.integers(0, 20),
    num_splits=st.integers(1, 5),
    per_block=st.sampled_from([None, 4, 16]),
    num_positions=st.integers(1, 2),
    seed=st.integers(0, 1000),
)
def test_any_shape(
    device: torch.device,
    group: int,
    num_kv_heads: int,
    head_dim: int,
    seen: tuple[int, ...],
    spare: int,
    num_splits: int,
    per_block: int | None,
    num_positions: int,
    seed: int,
) -> None:
    inputs = make_inputs(
        device,
        seen=seen,
        capacity=max(seen) + spare + 1,
        num_heads=group * num_kv_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        num_splits=num_splits,
        per_block=per_block,
        num_positions=num_positions,
        seed=seed,
    )
    for backend in BACKENDS:
        assert_matches_reference(inputs, backend)


def test_splits_are_chosen_for_few_rows_and_long_stores() -> None:
    from photon_kernels._attention_config import MAX_SPLITS, choose_num_splits

    assert choose_num_splits(num_elements=0, num_programs=8) == 1
    assert choose_num_splits(num_elements=200, num_programs=8) == 1
    assert choose_num_splits(num_elements=8192, num_programs=8) == 32
    assert choose_num_splits(num_elements=8192, num_programs=64) == 5
    assert choose_num_splits(num_elements=8192, num_programs=2048) == 1
    assert choose_num_splits(num_elements=10**6, num_programs=1) == MAX_SPLITS


def test_the_number_of_splits_is_chosen_when_it_is_not_given(
    monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    monkeypatch.setattr("photon_kernels._attention_config.MIN_PER_SPLIT", 16)
    assert_matches_reference(make_inputs(device, num_splits=None), "triton")


def test_wrong_shapes_are_named(device: torch.device) -> None:
    inputs = make_inputs(device)
    for change, message in [
        (dict(seen=inputs.seen[:2]), r"seen must be int32 or int64 \[3, 1\]"),
        (dict(seen=inputs.seen[:, 0]), r"seen must be int32 or int64 \[3, 1\]"),
        (dict(block_table=inputs.seen[:2]), "3 rows of queries, but 2 cache rows"),
        (dict(block_table=inputs.seen.float()), "block_table must be int32 or int64"),
        (dict(rows=inputs.seen[:2, 0]), r"rows must be int32 or int64 \[3\]"),
        (dict(v=inputs.v[..., :8]), r"expected q \[B, Hq, Q, D\]"),
        (dict(num_splits=0), "num_splits must be at least 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            replace(inputs, **change).run("torch")
