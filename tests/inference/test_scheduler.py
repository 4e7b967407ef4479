"""Who runs, who waits and who gives way, in which order."""

from __future__ import annotations

import pytest
import torch
from fake_cache import FakeCache

from photon_train.inference.prefix import PrefixCache, prefix_keys
from photon_train.inference.request import SamplingParams, Sequence
from photon_train.inference.scheduler import Plan, Scheduler

SEGMENT = 4


class Bench:
    """A scheduler over a cache of blocks of 4 tokens, and what an engine does with its plans.

    Sequences are named by the order of their arrival. `keep` stores every prefix that a prefill passes, as the engine
    does.
    """

    def __init__(self, num_rows=9, num_blocks=99, max_running=9, step_tokens=99, max_prefixes=0):
        self.cache = FakeCache(num_rows, num_blocks)
        self.prefixes = PrefixCache(self.cache, max_prefixes)
        self.scheduler = Scheduler(self.cache, self.prefixes, max_running, SEGMENT, step_tokens)
        self.sequences: list[Sequence] = []

    def add(self, *prompts: int | list[int]) -> list[Sequence]:
        """Queue prompts, given by their tokens, or by their length where each is to differ from all others."""
        new = []
        for prompt in prompts:
            name = len(self.sequences)
            tokens = [100 + name] * prompt if isinstance(prompt, int) else prompt
            new.append(Sequence(name, 0, tokens, SamplingParams(), prefix_keys(tokens, SEGMENT)))
            self.sequences.append(new[-1])
            self.scheduler.add(new[-1])
        return new

    def step(self) -> Plan:
        plan = self.scheduler.plan()
        for sequence, count in plan.prefill:
            sequence.allocation.length += count
            self.prefixes.keep(dict(sequence.keys)[sequence.allocation.length], sequence.allocation, torch.zeros(1))
        for sequence in plan.decode:
            sequence.allocation.length += 1
        return plan

    def names(self, sequences) -> list[int]:
        return [self.sequences.index(sequence) for sequence in sequences]

    @property
    def running(self) -> list[int]:
        return self.names(self.scheduler.running)

    @property
    def waiting(self) -> list[int]:
        return self.names(self.scheduler.waiting)


def test_first_come_first_served():
    bench = Bench(max_running=2)
    bench.add(3, 3, 3, 3)
    bench.step()
    assert bench.running == [0, 1] and bench.waiting == [2, 3]
    bench.scheduler.remove(bench.sequences[0])
    bench.step()
    assert bench.running == [1, 2] and bench.waiting == [3]


@pytest.mark.parametrize("limit", ["blocks", "rows"])
def test_nobody_is_overtaken_for_want_of_memory(limit):
    """The second prompt does not fit, the third would."""
    bench = Bench(num_blocks=4) if limit == "blocks" else Bench(num_rows=1)
    bench.add(8, 12, 4)
    bench.step()
    assert bench.running == [0] and bench.waiting == [1, 2]
    assert len(bench.cache.free_rows) == (8 if limit == "blocks" else 0), "an attempt takes nothing"
    bench.scheduler.remove(bench.sequences[0])
    bench.step()
    assert bench.running[0] == 1


def test_prompts_are_fed_in_the_order_of_arrival_within_the_steps_tokens():
    bench = Bench(step_tokens=6)
    bench.add(10, 3, 9)
    fed = []
    for _ in range(5):
        plan = bench.step()
        fed.append([(bench.sequences.index(sequence), count) for sequence, count in plan.prefill])
    # Segments end at multiples of 4; a step begins no segment once its tokens are spent.
    assert fed == [[(0, 4), (1, 3)], [(0, 4), (2, 4)], [(0, 2), (2, 4)], [(2, 1)], []]


def decoding(bench: Bench, *prompts: int) -> None:
    """Add prompts that take whole blocks, and feed them: each needs a block for its next token."""
    bench.add(*prompts)
    bench.step()
    assert bench.running == list(range(len(prompts)))


def test_the_youngest_gives_way_and_the_oldest_goes_on():
    bench = Bench(num_blocks=4)
    decoding(bench, 4, 4, 4)  # one block is left
    plan = bench.step()
    assert bench.names(plan.decode) == [0, 1], "the oldest took the free block, the second the youngest's"
    assert bench.running == [0, 1] and bench.waiting == [2] and bench.scheduler.num_preemptions == 1
    assert bench.sequences[2].allocation is None and bench.sequences[2].saved.length == 4


def test_one_that_was_chosen_before_it_gave_way_is_not_decoded():
    bench = Bench(num_blocks=3)
    decoding(bench, 4, 3, 4)  # no block is left; the second has room for its next token
    plan = bench.step()
    assert bench.names(plan.decode) == [0, 1] and bench.waiting == [2]
    for _ in range(3):
        plan = bench.step()
    assert bench.sequences[0].allocation.length == 8 and bench.running == [0]
    assert bench.names(plan.decode) == [0] and bench.waiting == [1, 2]


def test_alone_and_without_room_it_gives_way_itself():
    bench = Bench(num_blocks=1)
    decoding(bench, 4)
    plan = bench.step()
    assert not plan.decode and not bench.running and bench.waiting == [0] and bench.cache.free_blocks == 1


def test_who_gave_way_comes_back_in_the_order_of_arrival_before_newcomers():
    bench = Bench(num_blocks=6)
    decoding(bench, 8, 4, 4)
    bench.add(4)
    bench.sequences[0].allocation.length = 8
    bench.step()  # the oldest takes the fifth block, the second the sixth, the youngest finds none
    assert bench.waiting == [2, 3]
    bench.cache.reserve(bench.sequences[0].allocation, 12)
    bench.sequences[0].allocation.length = 12
    bench.sequences[1].allocation.length = 8
    bench.step()
    assert bench.running == [0] and bench.waiting == [1, 2, 3]
    bench.scheduler.remove(bench.sequences[0])
    plan = bench.step()
    assert bench.running == [1, 2, 3] and bench.names(plan.decode) == [1, 2]
    assert bench.names(sequence for sequence, _ in plan.prefill) == [3]


def test_kept_prefixes_go_before_anyone_gives_way():
    bench = Bench(num_blocks=4, max_prefixes=2)
    decoding(bench, 4, 4)  # two blocks hold the sequences, two their prefixes
    plan = bench.step()
    assert bench.names(plan.decode) == [0, 1] and bench.scheduler.num_preemptions == 0 and len(bench.prefixes) == 0


def test_kept_prefixes_go_before_anyone_waits():
    bench = Bench(num_blocks=3, max_prefixes=2)
    decoding(bench, 3)
    bench.add(8)
    bench.step()
    assert bench.running == [0, 1] and len(bench.prefixes) == 0


def test_a_prompt_waits_for_its_beginning_and_lets_others_pass():
    common = [1, 2, 3, 4]
    bench = Bench(max_prefixes=4, step_tokens=4)
    bench.add([*common, 5, 6], [*common, 7], [*common, 8], 2)
    bench.step()
    assert bench.running == [0, 3] and bench.waiting == [1, 2], "what waits keeps its order"
    plan = bench.step()
    assert bench.running == [0, 3, 1, 2]
    assert [bench.sequences[name].allocation.length for name in (1, 2)] == [4, 4] and bench.prefixes.hit_tokens == 8
    assert bench.names(sequence for sequence, _ in plan.prefill) == [0, 3]


def test_a_prompt_does_not_wait_for_less_than_is_kept():
    bench = Bench(max_prefixes=4, step_tokens=4)
    (first,) = bench.add([1, 2, 3, 4, 5, 6, 7, 8, 9])
    bench.scheduler.plan()  # the first runs, and has not fed a token
    slot = bench.cache.open_sequence()
    slot.length = 8
    bench.prefixes.keep(first.keys[1][1], slot)
    bench.add([1, 2, 3, 4, 5, 6, 7, 8, 10])
    bench.step()
    assert bench.running == [0, 1] and bench.sequences[1].allocation.length == 8


def test_one_that_gave_way_waits_for_no_beginning():
    common = [1, 2, 3, 4]
    bench = Bench(num_blocks=4, max_prefixes=1)
    bench.add(3, [*common, 5, 6, 7, 8])
    for _ in range(3):
        bench.step()
    assert bench.waiting == [1] and bench.scheduler.num_preemptions == 1
    bench.scheduler.remove(bench.sequences[0])
    bench.cache.free_blocks = 9
    bench.add([*common, 9])
    bench.scheduler.waiting.rotate()  # the newcomer is admitted first, and is feeding the common beginning
    bench.step()
    assert bench.running == [2, 1]


def test_a_prompt_that_is_known_to_its_end_needs_no_prefill():
    bench = Bench(max_prefixes=4)
    bench.add([1, 2, 3])
    bench.step()
    bench.add([1, 2, 3])
    plan = bench.step()
    assert bench.names(sequence for sequence, _ in plan.ready) == [1] and not plan.prefill


@pytest.mark.parametrize("state", ["running", "waiting", "swapped out"])
def test_what_is_removed_gives_everything_back(state):
    bench = Bench(num_blocks=4, max_running=3)
    decoding(bench, 4, 4, 4)
    bench.add(2)
    bench.step()
    name = {"running": 1, "waiting": 3, "swapped out": 2}[state]
    free = bench.cache.free_blocks
    bench.scheduler.remove(bench.sequences[name])
    assert name not in (*bench.running, *bench.waiting)
    assert bench.sequences[name].allocation is None and bench.sequences[name].saved is None
    assert bench.cache.free_blocks == free + (2 if state == "running" else 0)
