"""The paged cache: its bytes, sharing, and states that come back bit by bit."""

from __future__ import annotations

import pytest
import torch
from tiny import tokens
from tiny_models import ALL, SOME, tiny_model, unit_tokens

from photon_train import accounting
from photon_train.errors import PhotonError
from photon_train.inference.blocks import BlockPool
from photon_train.inference.cache import CacheLayout, PagedCache
from photon_train.inference.runner import Runner


def paged(name: str, num_rows: int = 4, num_blocks: int = 80) -> tuple[Runner, PagedCache]:
    model = tiny_model(name)
    size = 2 * unit_tokens(model)
    fitted = CacheLayout.fit(model, 2**30, num_rows, size)
    cache = PagedCache(model, CacheLayout(num_rows, num_blocks, size, fitted.row_bytes, fitted.block_bytes))
    return Runner(model, cache), cache


def fed(runner: Runner, cache: PagedCache, ids: list[int]):
    allocation = cache.open_sequence()
    assert cache.reserve(allocation, len(ids))
    return allocation, runner.prefill([(allocation, ids)])


def next_logits(runner: Runner, cache: PagedCache, allocation, ids: list[int]) -> torch.Tensor:
    """Logits after each of `ids`, fed one by one."""
    out = []
    for token in ids:
        assert cache.reserve(allocation, allocation.length + 1)
        out.append(runner.decode([(allocation, token)])[0])
    return torch.stack(out)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_equal_the_formula(name, dtype):
    model = tiny_model(name).to(dtype)
    layout = CacheLayout.fit(model, 2**22, num_rows=3, max_length=100)
    cache = PagedCache(model, layout)
    assert cache.allocated_bytes() == layout.total_bytes <= 2**22
    empty = accounting.cache_bytes(model.config, 0, dtype.itemsize)
    assert layout.row_bytes == empty.constant
    # Two sequences of the same length that differ by whole blocks differ by what the formula says of the blocks.
    far = 50 * layout.block_size
    grown = [accounting.cache_bytes(model.config, far + n * layout.block_size, dtype.itemsize).growing for n in (0, 3)]
    assert grown[1] - grown[0] == 3 * layout.block_bytes
    allocation = cache.open_sequence()
    assert cache.reserve(allocation, layout.block_size)
    assert cache.used_bytes([allocation]) == layout.row_bytes + layout.block_bytes


@pytest.mark.parametrize("name", SOME)
def test_memory_is_filled_but_not_exceeded(name):
    model = tiny_model(name)
    size = 3 * unit_tokens(model)
    sizes = CacheLayout.fit(model, 2**30, 5, size, max_length=64)
    row, block = sizes.row_bytes, sizes.block_bytes
    for spare in (0, block - 1):
        layout = CacheLayout.fit(model, 5 * row + 7 * block + spare, 5, size, max_length=10_000)
        assert layout.num_blocks == 7
    with pytest.raises(PhotonError, match=f"give at least {5 * row + block}"):
        CacheLayout.fit(model, 5 * row + block - 1, 5, size)


def test_a_block_holds_whole_units():
    model = tiny_model("memory")
    with pytest.raises(PhotonError, match="block_size=16 is not a multiple of the 3 tokens under a unit"):
        CacheLayout.fit(model, 2**30, 1, block_size=16)
    assert CacheLayout.fit(model, 2**30, 1).block_size == 258


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("name", SOME)
def test_a_fork_shares_full_blocks_and_is_independent(name, share):
    runner, cache = paged(name)
    ids, more, other = (tokens(1, length, seed=length)[0].tolist() for length in (21, 14, 15))
    allocation, _ = fed(runner, cache, ids)
    copy = cache.fork(allocation, share)
    full = allocation.length // cache.layout.block_size if share else 0
    assert copy.blocks[:full] == allocation.blocks[:full] and copy.row != allocation.row
    assert set(copy.blocks[full:]).isdisjoint(allocation.blocks[full:])
    shared = cache.used_bytes([allocation, copy]) - cache.used_bytes([allocation])
    assert shared == cache.layout.row_bytes + len(copy.blocks[full:]) * cache.layout.block_bytes
    first = next_logits(runner, cache, allocation, more)
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
    allocation, _ = fed(runner, cache, ids)
    copy = cache.fork(allocation)
    expected = next_logits(runner, cache, copy, more)
    cache.close(copy)
    saved = cache.swap_out(allocation)
    # Others use its row and blocks meanwhile.
    for seed in range(3):
        fed(runner, cache, tokens(1, 23, seed=seed)[0].tolist())
    assert cache.num_free_rows == 1
    allocation = cache.swap_in(saved, 20)
    assert torch.equal(next_logits(runner, cache, allocation, more), expected)


@pytest.mark.parametrize("name", SOME)
def test_what_others_left_has_no_influence_be_it_nan(name):
    runner, cache = paged(name)
    ids, more = tokens(1, 19)[0].tolist(), tokens(1, 9, seed=3)[0].tolist()
    allocation, logits = fed(runner, cache, ids)
    expected = torch.cat([logits, next_logits(runner, cache, allocation, more)])
    cache.close(allocation)
    for states in (*cache.state.row_tensors(), *(t for store in cache.state.growing() for t in store.tensors())):
        if states.dtype != torch.long:
            states.fill_(torch.nan if states.is_floating_point() else 255)
    allocation, logits = fed(runner, cache, ids)
    assert torch.equal(torch.cat([logits, next_logits(runner, cache, allocation, more)]), expected)


def test_no_room_changes_nothing():
    runner, cache = paged("memory-full", num_rows=2, num_blocks=6)
    allocation, _ = fed(runner, cache, tokens(1, 20)[0].tolist())
    assert not cache.reserve(allocation, 49) and len(allocation.blocks) == 3
    assert cache.reserve(allocation, 48) and cache.fork(allocation, share=False) is None and cache.num_free_rows == 1
    saved = cache.swap_out(allocation)
    assert cache.pool.num_free == 6
    other = cache.open_sequence()
    assert cache.reserve(other, 32) and cache.swap_in(saved, 21) is None
    assert cache.pool.num_free == 2 and cache.num_free_rows == 1


def test_blocks_are_free_when_nobody_refers_to_them():
    pool = BlockPool(3)
    blocks = pool.take(2)
    pool.share(blocks[:1])
    assert pool.take(2) is None and pool.num_free == 1
    pool.release(blocks)
    assert pool.num_free == 2
    pool.release(blocks[:1])
    assert pool.num_free == 3 and not any(pool.references)


@pytest.mark.parametrize("name", ALL)
def test_segments_may_begin_anywhere(name):
    runner, cache = paged(name)
    ids = tokens(1, 30)[0].tolist()
    whole, expected = fed(runner, cache, ids)
    pieces = cache.open_sequence()
    assert cache.reserve(pieces, 30)
    for begin, end in ((0, 5), (5, 6), (6, 17), (17, 30)):
        found = runner.prefill([(pieces, ids[begin:end])])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
