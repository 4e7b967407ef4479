from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from photon_kernels import Window, summary_decode_attention

BACKENDS = ["torch", "triton"]


@dataclass
class Inputs:
    q: Tensor
    k: Tensor
    v: Tensor
    lengths: Tensor
    scale: float
    starts: Tensor | None = None
    unit_bias: Tensor | None = None
    rows: Tensor | None = None
    pages: Tensor | None = None
    window: Window | None = None
    num_splits: int | None = None

    def run(self, backend: str) -> tuple[Tensor, Tensor]:
        return summary_decode_attention(**vars(self), return_lse=True, backend=backend)


def make_window(
    batch: int, cache_rows: int, shape: tuple[int, ...], positions: int, generator: torch.Generator
) -> Window:
    """A ring of N entries in random order, some empty, with 2 sinks; each row's queries see about half of it."""
    entries = shape[2]
    order = torch.stack([torch.randperm(2 * entries, generator=generator)[:entries] for _ in range(cache_rows)])
    order[torch.rand(order.shape, generator=generator) < 0.2] = -1
    first = torch.randint(0, entries, (batch,), generator=generator)
    last = first[:, None] + torch.randint(0, entries, (batch, positions), generator=generator)
    k, v = (torch.randn(cache_rows, *shape[1:], generator=generator) for _ in range(2))
    return Window(k, v, order, first, last, num_sinks=min(2, entries))


def make_inputs(
    device: torch.device,
    lengths: tuple[int, ...] = (37, 12, 0),
    num_units: int = 40,
    num_heads: int = 4,
    num_kv_heads: int = 1,
    head_dim: int = 32,
    num_positions: int = 1,
    num_splits: int | None = None,
    cache_rows: int | None = None,
    bias: bool = True,
    starts: bool = False,
    per_page: int | None = None,
    window: int | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Inputs:
    """Streams with NaN wherever no query looks; with `window` so many ring entries; with `per_page` in shuffled pages.

    The row's last query sees `lengths` units, each before it one less.
    """
    generator = torch.Generator().manual_seed(seed)
    cache_rows = cache_rows or len(lengths)
    shape = (cache_rows, num_kv_heads, num_units, head_dim)
    rows = torch.randperm(cache_rows, generator=generator)[: len(lengths)] if cache_rows != len(lengths) else None
    inputs = Inputs(
        q=torch.randn(len(lengths), num_heads, num_positions, head_dim, generator=generator),
        k=torch.randn(shape, generator=generator),
        v=torch.randn(shape, generator=generator),
        lengths=(torch.tensor(lengths).long()[:, None] - torch.arange(num_positions).flip(0)).clamp(min=0),
        scale=head_dim**-0.5 * 1.3,
        unit_bias=torch.randn(num_units, generator=generator) if bias else None,
        rows=rows,
        num_splits=num_splits,
    )
    if starts:
        inputs.starts = torch.randint(-3, num_units, inputs.lengths.shape, generator=generator)
    if window:
        entries = (cache_rows, num_kv_heads, window, head_dim)
        inputs.window = make_window(len(lengths), cache_rows, entries, num_positions, generator)
    _poison(inputs)
    if per_page:
        _to_pages(inputs, per_page, generator)
    for name in ("q", "k", "v"):
        setattr(inputs, name, getattr(inputs, name).to(dtype))
    if window:
        inputs.window = inputs.window._replace(k=inputs.window.k.to(dtype), v=inputs.window.v.to(dtype))
        inputs.window = Window(*(x.to(device) if isinstance(x, Tensor) else x for x in inputs.window))
    for name, value in vars(inputs).items():
        if isinstance(value, Tensor):
            setattr(inputs, name, value.to(device))
    return inputs


def _visible(inputs: Inputs, query: int, position: int) -> tuple[list[int], list[int]]:
    """Units and ring entries that a query sees, from the definition, one by one."""
    start = 0 if inputs.starts is None else int(inputs.starts[query, position])
    units = list(range(max(start, 0), int(inputs.lengths[query, position])))
    entries = []
    if inputs.window is not None:
        window, row = inputs.window, query if inputs.rows is None else int(inputs.rows[query])
        first, last = int(window.first_visible[query]), int(window.last_visible[query, position])
        entries = [
            entry
            for entry, place in enumerate(window.order[row].tolist())
            if place != -1 and place <= last and (place >= first or entry < window.num_sinks)
        ]
    return units, entries


def _poison(inputs: Inputs) -> None:
    """NaN in every unit and ring entry that no query sees."""
    unseen = torch.ones(inputs.k.shape[0], inputs.k.shape[2], dtype=torch.bool)
    ring_unseen = None if inputs.window is None else torch.ones_like(inputs.window.order, dtype=torch.bool)
    for query, position in itertools.product(range(inputs.q.shape[0]), range(inputs.q.shape[2])):
        row = query if inputs.rows is None else int(inputs.rows[query])
        units, entries = _visible(inputs, query, position)
        unseen[row, units] = False
        if ring_unseen is not None:
            ring_unseen[row, entries] = False
    # A kernel may read what lies between the units of its queries.
    for query in range(inputs.q.shape[0]) if inputs.starts is not None else []:
        row = query if inputs.rows is None else int(inputs.rows[query])
        unseen[row, max(int(inputs.starts[query].min()), 0) // 64 * 64 : int(inputs.lengths[query].max())] = False
    for states in (inputs.k, inputs.v):
        states.masked_fill_(unseen[:, None, :, None], torch.nan)
    if inputs.unit_bias is not None:
        inputs.unit_bias.masked_fill_(unseen.all(0), torch.nan)
    if ring_unseen is not None:
        for states in inputs.window[:2]:
            states.masked_fill_(ring_unseen[:, None, :, None], torch.nan)


def _to_pages(inputs: Inputs, per_page: int, generator: torch.Generator) -> None:
    """Move the streams into pages that lie in random order among pages of NaN; unused table entries are wild."""
    cache_rows, heads, num_units, dim = inputs.k.shape
    width = -(-num_units // per_page)
    spare = width * per_page - num_units
    order = torch.randperm(2 * cache_rows * width, generator=generator)[: cache_rows * width].view(cache_rows, width)
    for name in ("k", "v"):
        padded = torch.nn.functional.pad(getattr(inputs, name), (0, 0, 0, spare), value=torch.nan)
        pages = torch.full((2 * cache_rows * width, heads, per_page, dim), torch.nan)
        pages[order] = padded.unflatten(2, (width, per_page)).transpose(1, 2)
        setattr(inputs, name, pages)
    if inputs.unit_bias is not None:
        inputs.unit_bias = torch.nn.functional.pad(inputs.unit_bias, (0, spare), value=torch.nan)
    table = torch.full_like(order, 10**12)
    for query in range(inputs.q.shape[0]):
        row = query if inputs.rows is None else int(inputs.rows[query])
        used = -(-int(inputs.lengths[query].max()) // per_page)
        table[row, :used] = order[row, :used]
    inputs.pages = table


def reference(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Softmax in float64 over what each query sees and nothing else, query by query."""
    out = torch.zeros(inputs.q.shape, dtype=torch.float64)
    lse = torch.full(inputs.q.shape[:3], float("-inf"), dtype=torch.float64)
    group = inputs.q.shape[1] // inputs.k.shape[1]
    for query, position in itertools.product(range(inputs.q.shape[0]), range(inputs.q.shape[2])):
        row = query if inputs.rows is None else int(inputs.rows[query])
        units, entries = _visible(inputs, query, position)
        if not units and not entries:
            continue
        keys, values = [], []
        for states, parts in ((inputs.k, keys), (inputs.v, values)):
            if inputs.pages is None:
                parts += [states[row, :, unit] for unit in units]
            else:
                per_page = states.shape[2]
                parts += [states[inputs.pages[row, unit // per_page], :, unit % per_page] for unit in units]
        if inputs.window is not None:
            keys += [inputs.window.k[row, :, entry] for entry in entries]
            values += [inputs.window.v[row, :, entry] for entry in entries]
        k, v = (torch.stack(parts, dim=1).double().cpu().repeat_interleave(group, dim=0) for parts in (keys, values))
        bias = torch.zeros(len(units) + len(entries), dtype=torch.float64)
        if inputs.unit_bias is not None:
            bias[: len(units)] = inputs.unit_bias[units].double().cpu()
        q = inputs.q[query, :, position].double().cpu()
        logits = torch.einsum("hd,hnd->hn", q, k) * inputs.scale + bias
        lse[query, :, position] = torch.logsumexp(logits, dim=-1)
        out[query, :, position] = torch.einsum("hn,hnd->hd", torch.softmax(logits, dim=-1), v)
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
    "pages shorter than a tile": dict(per_page=3, lengths=(37, 12, 1), num_splits=2, num_heads=8, num_kv_heads=2),
    "pages of whole tiles": dict(per_page=32, lengths=(70, 33), num_units=70, num_splits=2),
    "window": dict(window=21, num_splits=1),
    "window and pages, three splits": dict(window=21, per_page=5, num_splits=3, num_units=60, lengths=(60, 33, 0)),
    "window, no units": dict(window=37, num_units=0, lengths=(0, 0), num_splits=2),
    "starts": dict(starts=True, num_splits=2, num_units=90, lengths=(90, 50)),
    "starts and pages": dict(starts=True, per_page=16, num_units=90, lengths=(90, 50), num_splits=1),
    "positions": dict(num_positions=3, num_splits=2, window=9, num_heads=8, num_kv_heads=2),
    "positions with starts": dict(num_positions=9, starts=True, num_heads=8, lengths=(40, 12), per_page=8),
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
    inputs = make_inputs(
        device, dtype=dtype, num_splits=num_splits, lengths=(70, 50), num_units=70, window=20, per_page=16
    )
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
    assert_matches_reference(make_inputs(device, cache_rows=6, num_splits=2, window=7, per_page=8), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_need_not_be_contiguous(backend: str, device: torch.device) -> None:
    inputs = make_inputs(device, num_heads=4, num_kv_heads=2, num_splits=2, window=18, per_page=16)
    expected = inputs.run("torch")
    inputs.k, inputs.v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (inputs.k, inputs.v))
    inputs.q = torch.cat([inputs.q, inputs.q], dim=1)[:, :4]
    inputs.unit_bias = inputs.unit_bias.repeat_interleave(2)[::2]
    inputs.lengths = inputs.lengths.int().repeat_interleave(2, dim=0)[::2]
    inputs.pages = torch.cat([inputs.pages, inputs.pages], dim=1)[:, : inputs.pages.shape[1]]
    window = inputs.window
    moved = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in window[:2])
    inputs.window = Window(*moved, window.order.mT.contiguous().mT, *window[3:])
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
    assert lse.shape == inputs.q.shape[:3] and torch.isneginf(lse).all()


@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    group=st.sampled_from([1, 3, 4, 8]),
    num_kv_heads=st.integers(1, 2),
    head_dim=st.sampled_from([16, 24, 32]),
    lengths=st.lists(st.integers(0, 100), min_size=1, max_size=3).map(tuple),
    spare=st.integers(0, 20),
    num_splits=st.integers(1, 5),
    bias=st.booleans(),
    starts=st.booleans(),
    per_page=st.sampled_from([None, 4, 16]),
    window=st.sampled_from([None, 5, 40]),
    num_positions=st.integers(1, 2),
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
    starts: bool,
    per_page: int | None,
    window: int | None,
    num_positions: int,
    seed: int,
) -> None:
    inputs = make_inputs(
        device,
        lengths=lengths,
        num_units=max(lengths) + spare + 1,
        num_heads=group * num_kv_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        num_splits=num_splits,
        bias=bias,
        starts=starts,
        per_page=per_page,
        window=window,
        num_positions=num_positions,
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
    inputs = make_inputs(device, window=5)
    for change, message in [
        (dict(lengths=inputs.lengths[:2]), r"lengths must be int32 or int64 \[3, 1\]"),
        (dict(starts=inputs.lengths[:, 0]), r"starts must be int32 or int64 \[3, 1\]"),
        (dict(pages=inputs.lengths[:2]), "3 rows of queries, but 2 cache rows"),
        (dict(pages=inputs.lengths.float()), "pages must be int32 or int64"),
        (dict(window=inputs.window._replace(last_visible=inputs.lengths[:2])), "window.last_visible must be int32"),
        (dict(window=inputs.window._replace(k=inputs.window.k[..., :8])), r"expected q \[B, Hq, Q, D\]"),
        (dict(unit_bias=inputs.unit_bias[:5]), r"unit_bias must be \[40\]"),
        (dict(num_splits=0), "num_splits must be at least 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            replace(inputs, **change).run("torch")
