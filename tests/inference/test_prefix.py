"""Which prefixes are kept, found and forgotten, and in which order."""

from __future__ import annotations

import pytest
import torch
from fake_cache import FakeCache, Slot

from photon_train.inference.prefix import PrefixCache, prefix_keys

STRIDE = 4


def key(name: int) -> bytes:
    """The key of a prompt of one segment, another for every name."""
    return prefix_keys([name] * STRIDE, STRIDE)[-1][1]


def slot_of(length: int = STRIDE) -> Slot:
    return Slot(row=-1, length=length)


def kept(prefixes: PrefixCache, names: range) -> list[int]:
    return [name for name in names if prefixes.find([(STRIDE, key(name))])]


def test_the_least_recently_used_goes_first():
    cache = FakeCache(num_rows=4, num_blocks=4)
    prefixes = PrefixCache(cache, max_prefixes=4)
    for name in range(4):
        prefixes.keep(key(name), slot_of())
    copies = list(cache.forked)
    assert prefixes.find([(STRIDE, key(0))]).allocation is copies[0]
    assert prefixes.find([(STRIDE, key(2))]).allocation is copies[2]
    while prefixes.evict():
        pass
    assert cache.closed == [copies[1], copies[3], copies[0], copies[2]]
    assert len(prefixes) == 0 and cache.free_blocks == 4 and len(cache.free_rows) == 4


def test_a_full_cache_makes_room_for_the_newest():
    prefixes = PrefixCache(FakeCache(num_rows=9, num_blocks=9), max_prefixes=2)
    for name in range(3):
        prefixes.keep(key(name), slot_of())
    assert kept(prefixes, range(3)) == [1, 2]
    prefixes.find([(STRIDE, key(1))])
    prefixes.keep(key(3), slot_of())
    assert kept(prefixes, range(4)) == [1, 3]


def test_keeping_what_is_kept_changes_nothing():
    cache = FakeCache(num_rows=9, num_blocks=9)
    prefixes = PrefixCache(cache, max_prefixes=2)
    for name in (0, 1, 0):
        prefixes.keep(key(name), slot_of())
    assert len(cache.forked) == 2 and not cache.closed


@pytest.mark.parametrize(("num_rows", "num_blocks"), [(1, 9), (9, 1)])
def test_without_room_nothing_is_kept(num_rows, num_blocks):
    prefixes = PrefixCache(FakeCache(num_rows, num_blocks), max_prefixes=4)
    for name in range(2):
        prefixes.keep(key(name), slot_of())
    assert kept(prefixes, range(2)) == [0]


def test_what_is_forgotten_gives_its_row_and_blocks_back():
    cache = FakeCache(num_rows=4, num_blocks=4)
    prefixes = PrefixCache(cache, max_prefixes=4)
    for name in range(3):
        prefixes.keep(key(name), slot_of())
    prefixes.forget([(STRIDE, key(name)) for name in (0, 2, 9)])
    assert kept(prefixes, range(3)) == [1] and len(cache.free_rows) == cache.free_blocks == 3


def test_zero_keeps_none():
    cache = FakeCache(num_rows=9, num_blocks=9)
    prefixes = PrefixCache(cache, max_prefixes=0)
    prefixes.keep(key(0), slot_of())
    assert len(prefixes) == 0 and not cache.forked and not prefixes.evict()


def test_the_longest_beginning_is_found():
    prefixes = PrefixCache(FakeCache(num_rows=9, num_blocks=9), max_prefixes=4)
    tokens = list(range(11))
    keys = prefix_keys(tokens, STRIDE)
    assert [length for length, _ in keys] == [4, 8, 11]
    for length, name in keys[:2]:
        prefixes.keep(name, slot_of(length))
    assert prefixes.find(keys).allocation.length == 8
    assert prefixes.find(prefix_keys(tokens[:6], STRIDE)).allocation.length == 4
    assert prefixes.find(prefix_keys(tokens[:3] + [99] * 5, STRIDE)) is None


def test_a_prompts_end_is_not_the_beginning_of_a_longer_one():
    prefixes = PrefixCache(FakeCache(num_rows=9, num_blocks=9), max_prefixes=4)
    short, longer = prefix_keys([1, 2, 3, 4], STRIDE), prefix_keys([1, 2, 3, 4, 5], STRIDE)
    logits = torch.tensor([1.0, 2.0])
    prefixes.keep(short[0][1], slot_of(), logits)
    logits.zero_()
    assert prefixes.find(longer) is None
    assert prefixes.find(short).logits.tolist() == [1.0, 2.0], "kept logits are a copy"
