"""The paged cache: its bytes, sharing, and states that come back bit by bit."""

from __future__ import annotations

import pytest
import torch
from tiny import HIERARCHIES, photon_config, photon_model, tokens

from photon_train import accounting
from photon_train.errors import PhotonError
from photon_train.inference.cache import CacheLayout, PagedCache
from photon_train.inference.pages import PagePool
from photon_train.inference.runner import Runner

NAMES = sorted(HIERARCHIES)
SOME = ["memory-3-full", "residual-2-decoder", "slots-3", "block-2"]


def paged(name: str, num_rows: int = 4, num_pages: int = 24) -> tuple[Runner, PagedCache]:
    model = photon_model(name)
    tokens_per_page = 2 * model.config.top_span
    empty = accounting.cache_bytes(model.config, 0, 4)
    page = accounting.cache_bytes(model.config, tokens_per_page, 4).growing
    layout = CacheLayout(num_rows, num_pages, tokens_per_page, empty.constant + empty.buffers, page)
    cache = PagedCache(model, layout)
    return Runner(model, cache), cache


def fed(runner: Runner, cache: PagedCache, ids: list[int]):
    held = cache.open_sequence()
    assert cache.reserve(held, len(ids))
    return held, runner.prefill([(held, ids)])


def next_logits(runner: Runner, cache: PagedCache, held, ids: list[int]) -> torch.Tensor:
    """Logits after each of `ids`, fed one by one."""
    out = []
    for token in ids:
        assert cache.reserve(held, held.length + 1)
        out.append(runner.decode([(held, token)])[0])
    return torch.stack(out)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_equal_the_formula(name, dtype):
    model = photon_model(name).to(dtype)
    size = dtype.itemsize
    layout = CacheLayout.fit(model.config, 2**22, num_rows=3, dtype_bytes=size, max_length=100)
    cache = PagedCache(model, layout)
    allocated = cache.kv_bytes()
    formula = accounting.cache_bytes(model.config, layout.page_tokens, size)
    assert allocated["growing"] == layout.num_pages * formula.growing
    assert allocated["constant"] == layout.num_rows * formula.constant
    assert allocated["buffers"] == layout.num_rows * formula.buffers
    assert sum(allocated.values()) == layout.total_bytes <= 2**22
    # A sequence of whole pages holds what the formula says for its length.
    held = cache.open_sequence()
    assert cache.reserve(held, 2 * layout.page_tokens) or layout.num_pages < 2
    if len(held.pages) == 2:
        whole = accounting.cache_bytes(model.config, 2 * layout.page_tokens, size)
        assert cache.used_bytes([held]) == whole.total


@pytest.mark.parametrize("name", NAMES)
def test_memory_is_filled_but_not_exceeded(name):
    config = photon_config(name)
    row = CacheLayout.fit(config, 2**30, 5, 4, max_length=64).row_bytes
    page = accounting.cache_bytes(config, 3 * config.top_span, 4).growing
    for spare in (0, page - 1):
        layout = CacheLayout.fit(config, 5 * row + 7 * page + spare, 5, 4, 3 * config.top_span, max_length=10_000)
        assert layout.num_pages == 7
    with pytest.raises(PhotonError, match=f"give at least {5 * row + page}"):
        CacheLayout.fit(config, 5 * row + page - 1, 5, 4, 3 * config.top_span)


def test_a_page_holds_whole_meta_contexts():
    config = photon_config("memory-2-sinks")
    with pytest.raises(PhotonError, match="page_tokens=16 is not a multiple of the 6 tokens"):
        CacheLayout.fit(config, 2**30, 1, 4, page_tokens=16)
    assert CacheLayout.fit(config, 2**30, 1, 4).page_tokens == 258


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("name", SOME)
def test_a_fork_shares_full_pages_and_is_independent(name, share):
    runner, cache = paged(name)
    ids, more, other = (tokens(1, length, seed=length)[0].tolist() for length in (21, 14, 15))
    held, _ = fed(runner, cache, ids)
    copy = cache.fork(held, share)
    full = held.length // cache.layout.page_tokens if share else 0
    assert copy.pages[:full] == held.pages[:full] and copy.row != held.row
    assert set(copy.pages[full:]).isdisjoint(held.pages[full:])
    shared = cache.used_bytes([held, copy]) - cache.used_bytes([held])
    assert shared == cache.layout.row_bytes + len(copy.pages[full:]) * cache.layout.page_bytes
    first = next_logits(runner, cache, held, more)
    second = next_logits(runner, cache, copy, other)
    again, _ = fed(runner, cache, ids)
    torch.testing.assert_close(first, next_logits(runner, cache, again, more), atol=1e-5, rtol=0)
    cache.close(again)
    again, _ = fed(runner, cache, ids)
    torch.testing.assert_close(second, next_logits(runner, cache, again, other), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", SOME)
def test_a_swapped_sequence_goes_on_as_if_nothing_had_happened(name):
    runner, cache = paged(name)
    ids, more = tokens(1, 19)[0].tolist(), tokens(1, 9, seed=3)[0].tolist()
    held, _ = fed(runner, cache, ids)
    copy = cache.fork(held)
    expected = next_logits(runner, cache, copy, more)
    cache.close(copy)
    saved = cache.swap_out(held)
    # Others use its row and pages meanwhile.
    for seed in range(3):
        fed(runner, cache, tokens(1, 23, seed=seed)[0].tolist())
    assert cache.num_free_rows == 1
    held = cache.swap_in(saved, 20)
    assert torch.equal(next_logits(runner, cache, held, more), expected)


def test_no_room_changes_nothing():
    runner, cache = paged("memory-3-full", num_rows=2, num_pages=3)
    held, _ = fed(runner, cache, tokens(1, 20)[0].tolist())
    assert not cache.reserve(held, 49) and len(held.pages) == 2
    assert cache.reserve(held, 48) and cache.fork(held) is None and cache.num_free_rows == 1
    saved = cache.swap_out(held)
    assert cache.pool.num_free == 3
    other = cache.open_sequence()
    assert cache.reserve(other, 32) and cache.swap_in(saved, 21) is None
    assert cache.pool.num_free == 1 and cache.num_free_rows == 1


def test_pages_are_free_when_nobody_holds_them():
    pool = PagePool(3)
    pages = pool.take(2)
    pool.share(pages[:1])
    assert pool.take(2) is None and pool.num_free == 1
    pool.release(pages)
    assert pool.num_free == 2
    pool.release(pages[:1])
    assert pool.num_free == 3 and not any(pool.holders)


def test_a_segment_begins_at_a_boundary():
    runner, cache = paged("memory-1")
    held, _ = fed(runner, cache, tokens(1, 5)[0].tolist())
    cache.reserve(held, 8)
    with pytest.raises(ValueError, match="multiple of 4 tokens"):
        runner.prefill([(held, [5, 6])])
