from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from photon_kernels import Append, cache_append

BACKENDS = ["torch", "triton"]


def make_append(
    device: torch.device,
    rows: int = 3,
    heads: int = 2,
    positions: int = 1,
    head_dim: int = 8,
    size: int = 6,
    per_block: int | None = None,
    dtype: torch.dtype = torch.float32,
    target_dtype: torch.dtype | None = None,
    skip: float = 0.3,
    seed: int = 0,
) -> Append:
    """States for shuffled rows of a cache of NaN, each at its own slots; some are skipped and hold NaN themselves."""
    generator = torch.Generator().manual_seed(seed)
    cache_rows = rows + 2
    slots = torch.stack([torch.randperm(size, generator=generator)[:positions] for _ in range(rows)])
    slots[torch.rand(slots.shape, generator=generator) < skip] = -1
    source = torch.randn(rows, heads, positions, head_dim, generator=generator)
    source.masked_fill_((slots < 0)[:, None, :, None], torch.nan)
    block_table = None
    shape = (cache_rows, heads, size, head_dim)
    if per_block:
        width = -(-size // per_block)
        block_table = torch.randperm(cache_rows * width + 3, generator=generator)[: cache_rows * width].view(-1, width)
        shape = (cache_rows * width + 3, heads, per_block, head_dim)
    return Append(
        source.to(device, dtype),
        torch.full(shape, torch.nan, device=device, dtype=target_dtype or dtype),
        torch.randperm(cache_rows, generator=generator)[:rows].to(device),
        slots.to(device),
        None if block_table is None else block_table.to(device),
    )


def expected_target(append: Append) -> torch.Tensor:
    """From the definition, state by state."""
    target = append.target.clone()
    for row, slots in enumerate(append.slots.tolist()):
        for position, slot in enumerate(slots):
            if slot >= 0:
                block, inside = int(append.rows[row]), slot
                if append.block_table is not None:
                    block, inside = int(append.block_table[block, slot // target.shape[2]]), slot % target.shape[2]
                target[block, :, inside] = append.source[row, :, position].to(target.dtype)
    return target


def assert_appends(appends: list[Append], backend: str) -> None:
    expected = [expected_target(append) for append in appends]
    cache_append(appends, backend=backend)
    for append, target in zip(appends, expected, strict=True):
        torch.testing.assert_close(append.target, target, rtol=0, atol=0, equal_nan=True)


LAYOUTS = {
    "keys and values": [dict(), dict(seed=1)],
    "several slots": [dict(positions=4), dict(positions=4, seed=1)],
    "nothing skipped, odd sizes": [dict(rows=2, heads=3, head_dim=5, size=7, skip=0.0)],
    "everything skipped": [dict(skip=1.0), dict(skip=1.0, per_block=4)],
    "token, level 1, level 2, open chunks": [
        dict(skip=0.0),
        dict(per_block=4, size=11, seed=1),
        dict(per_block=1, size=3, skip=0.6, seed=2),
        dict(heads=1, head_dim=1100, size=4, skip=0.0, seed=3),
        dict(heads=1, head_dim=1100, size=4, seed=4),
    ],
    "more than one launch": [dict(rows=1, seed=seed) for seed in range(9)],
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_stores_what_closes_and_touches_nothing_else(layout: list[dict], backend: str, device: torch.device) -> None:
    assert_appends([make_append(device, **settings) for settings in layout], backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_copied_bit_by_bit(dtype: torch.dtype, backend: str, device: torch.device) -> None:
    assert_appends([make_append(device, dtype=dtype, per_block=2)], backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_casts_to_the_type_of_the_cache(backend: str, device: torch.device) -> None:
    assert_appends([make_append(device, dtype=torch.float16, target_dtype=torch.float32)], backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sources_and_tables_need_not_be_contiguous(backend: str, device: torch.device) -> None:
    append = make_append(device, positions=2, per_block=2, size=4)
    append = append._replace(
        source=append.source.transpose(1, 2).contiguous().transpose(1, 2),
        rows=append.rows.int().repeat_interleave(2)[::2],
        slots=append.slots.int().mT.contiguous().mT,
        block_table=torch.cat([append.block_table, append.block_table], dim=1)[:, : append.block_table.shape[1]],
        target=append.target.transpose(1, 2).contiguous().transpose(1, 2),
    )
    assert not append.target.is_contiguous() and not append.source.is_contiguous()
    assert_appends([append], backend)
    assert_appends([make_append(device)._replace(source=torch.randn(3, 2, 8, 1, device=device).mT)], backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_append(backend: str, device: torch.device) -> None:
    cache_append([], backend=backend)
    append = make_append(device)
    empty = append._replace(source=append.source[:0], rows=append.rows[:0], slots=append.slots[:0])
    assert_appends([empty], backend)


@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(1, 4),
    layouts=st.lists(
        st.fixed_dictionaries(
            {
                "heads": st.integers(1, 3),
                "positions": st.integers(1, 3),
                "head_dim": st.integers(1, 20),
                "size": st.integers(3, 9),
                "per_block": st.sampled_from([None, 1, 2, 5]),
                "seed": st.integers(0, 99),
            }
        ),
        min_size=1,
        max_size=3,
    ),
)
def test_any_layout(device: torch.device, rows: int, layouts: list[dict]) -> None:
    for backend in BACKENDS:
        assert_appends([make_append(device, rows=rows, **layout) for layout in layouts], backend)


def test_wrong_shapes_are_named(device: torch.device) -> None:
    append = make_append(device)
    for change, message in [
        (dict(source=append.source[0]), r"expected a source \[n, H, Q, D\]"),
        (dict(source=append.source[..., :4]), r"expected a source \[n, H, Q, D\]"),
        (dict(rows=append.rows[:2]), r"rows must be int32 or int64 \[3\]"),
        (dict(slots=append.slots[:, 0]), r"slots must be int32 or int64 \[3, 1\]"),
        (dict(block_table=append.slots.float()), "block_table must be int32 or int64"),
    ]:
        with pytest.raises(ValueError, match=message):
            cache_append([append._replace(**change)])
    for other in (make_append(device, rows=2), make_append(device, dtype=torch.float16)):
        with pytest.raises(ValueError, match="the same number of rows and the same dtypes"):
            cache_append([append, other])


def test_a_target_that_cannot_be_written_in_place_is_refused(device: torch.device) -> None:
    append = make_append(device)
    strided = append.target.new_empty(5, 2, 8, 6).mT
    with pytest.raises(ValueError, match="last dimension of every target must be contiguous"):
        cache_append([append._replace(target=strided)], backend="triton")


def test_a_row_may_have_more_than_2_to_31_elements(device: torch.device) -> None:
    """6 GB of which next to nothing is touched: an offset of 32 bits would lie before its beginning."""
    if device.type == "cuda":
        pytest.skip("a GPU's memory is not given page by page")
    target = torch.empty(1, 3, 2**26 + 3, 16, dtype=torch.float16)
    source = torch.randn(1, 3, 1, 16).half()
    append = Append(source, target, torch.zeros(1, dtype=torch.long), torch.tensor([[5]]))
    cache_append([append], backend="triton")
    assert torch.equal(target[:, :, 5:6], source)
