"""A step that fails, a queue that is full and a server that ends: who is told what, and what goes on."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest
import torch
from tiny import photon_model

from photon_train.errors import PhotonError
from photon_train.inference.engine import Engine, EngineSettings
from photon_train.inference.request import SamplingParams
from photon_train.inference.worker import FAILURES_TO_UNHEALTHY, Busy, NotServing, RequestFailed, Worker

PARAMS = SamplingParams(max_new_tokens=6, ignore_eos=True)
PROMPTS = [[5, 6, 7], [8] * 12, [9, 10], [5, 6, 11]]


def make_engine(**changes) -> Engine:
    sizes = {"max_sequences": 2, "max_prefixes": 2, "max_length": 64, "block_size": 6, "segment_tokens": 4, **changes}
    return Engine(photon_model("memory"), settings=EngineSettings(cuda_graphs="off", **sizes))


def failing(function, at: int):
    """`function`, whose call number `at` fails after it has done its work."""
    calls = 0

    def call(*args, **kwargs):
        nonlocal calls
        result, calls = function(*args, **kwargs), calls + 1
        if calls == at:
            raise torch.OutOfMemoryError("out of memory\nwith a long explanation")
        return result

    return call


def assert_all_free(engine: Engine) -> None:
    engine.prefixes.clear()
    assert not engine.has_work and not engine.scheduler.running and not engine.scheduler.waiting
    assert sorted(engine.cache._free_rows) == list(range(engine.cache.layout.num_rows))
    assert engine.cache.pool.num_free == engine.cache.pool.num_blocks and not any(engine.cache.pool.references)


PLACES = [
    ("runner", "decode", 2),
    ("runner", "prefill", 2),
    ("cache", "open_sequence", 2),
    ("cache", "fork", 1),
    ("cache", "reserve", 4),
    ("cache", "swap_out", 1),
    ("cache", "swap_in", 1),
]


@pytest.mark.parametrize(("part", "name", "at"), PLACES, ids=[f"{part}.{name}" for part, name, _ in PLACES])
def test_a_failed_step_takes_its_requests_and_nothing_else(part, name, at, monkeypatch):
    # Too few blocks for two sequences: one is swapped out and in again.
    engine = make_engine(memory=None if part == "runner" else make_memory(blocks=4))
    expected = [make_engine().generate([prompt], PARAMS)[0][0].tokens for prompt in PROMPTS]
    monkeypatch.setattr(getattr(engine, part), name, failing(getattr(getattr(engine, part), name), at))
    numbers, failed = [engine.add(prompt, PARAMS) for prompt in PROMPTS], 0
    while engine.has_work:
        try:
            engine.step()
        except torch.OutOfMemoryError:
            failed += 1
    assert failed == 1
    answers = [engine.result(number) for number in numbers]
    assert 1 <= sum(answer is None for answer in answers) < len(PROMPTS)
    assert all(answer is None or answer[0].tokens == tokens for answer, tokens in zip(answers, expected, strict=True))
    assert_all_free(engine)


def make_memory(blocks: int) -> int:
    layout = make_engine().cache.layout
    return layout.num_rows * layout.row_bytes + blocks * layout.block_bytes


async def answer(worker: Worker, prompt: list[int], params: SamplingParams = PARAMS) -> list[int]:
    (ticket,) = await worker.submit([prompt], params)
    return [event.token async for event in ticket]


@pytest.fixture
def worker():
    worker = Worker(make_engine(), max_waiting=4)
    worker.start()
    yield worker
    worker.stop()


def test_the_server_goes_on_after_a_failed_step(worker):
    engine = worker.engine
    (expected,) = make_engine().generate([[5, 6]], PARAMS)
    decode = engine.runner.decode

    def broken(*work):
        raise torch.OutOfMemoryError("out of memory\nwith a long explanation")

    for failures in range(1, FAILURES_TO_UNHEALTHY + 1):
        engine.runner.decode = broken
        with pytest.raises(RequestFailed, match="answer: OutOfMemoryError: out of memory$"):
            asyncio.run(answer(worker, [5, 6]))
        assert worker.is_healthy == (failures < FAILURES_TO_UNHEALTHY) and worker.num_open == 0
        # A prefill succeeds before the decoding step fails: only steps in a row count.
        engine.runner.prefill = broken
    del engine.runner.prefill
    engine.runner.decode = decode
    assert asyncio.run(answer(worker, [5, 6])) == expected[0].tokens
    assert worker.is_healthy
    assert_all_free(engine)


def test_too_many_are_told_to_try_again(worker):
    step, go = worker.engine.step, threading.Event()
    worker.engine.step = lambda: go.wait(10) and step()

    async def ask():
        running = [asyncio.create_task(answer(worker, [5, 6]))]
        deadline = time.monotonic() + 10
        while worker.num_waiting != 1 and time.monotonic() < deadline:  # the engine has it, and its step waits
            await asyncio.sleep(0.01)
        running += [asyncio.create_task(answer(worker, [7])) for _ in range(3)]
        await asyncio.sleep(0.02)
        with pytest.raises(Busy, match="4 continuations wait, of at most 4: try again later"):
            await answer(worker, [8])
        with pytest.raises(PhotonError, match="5 continuations are more than the 4"):
            await answer(worker, [8], SamplingParams(n=5))
        go.set()
        assert [len(tokens) for tokens in await asyncio.gather(*running)] == [6] * 4
        assert len(await answer(worker, [8])) == 6

    asyncio.run(ask())


def test_if_one_of_several_prompts_is_refused_all_are_forgotten(worker):
    """Wherever it stands among them, long before the others could end."""
    for prompts in ([[61], [5], [6]], [[5], [61], [6]]):
        before = worker.metrics.requests["dropped"]
        with pytest.raises(PhotonError, match="token 61 is outside"):
            asyncio.run(worker.submit(prompts, SamplingParams(max_new_tokens=50, ignore_eos=True)))
        deadline = time.monotonic() + 10
        while worker.num_open and time.monotonic() < deadline:
            time.sleep(0.01)
        assert worker.metrics.requests["dropped"] == before + 2 and worker.metrics.requests["answered"] == 0
    assert_all_free(worker.engine)


def test_who_comes_while_the_server_ends_is_refused():
    worker = Worker(make_engine())
    worker.start()
    step, begun = worker.engine.step, threading.Event()
    worker.engine.step = lambda: begun.set() or time.sleep(0.1) or step()

    async def ask():
        running = asyncio.create_task(answer(worker, [5, 6]))
        await asyncio.to_thread(begun.wait)
        late = asyncio.create_task(answer(worker, [7]))
        await asyncio.sleep(0.02)  # `late` is queued, and the step goes on
        stopping = asyncio.create_task(asyncio.to_thread(worker.stop))
        await asyncio.sleep(0.02)
        with pytest.raises(NotServing, match="does not take requests"):  # the thread still runs
            await answer(worker, [8])
        for task in (running, late):
            with pytest.raises(NotServing, match="shutting down"):
                await task
        await stopping
        with pytest.raises(NotServing):
            await answer(worker, [8])

    asyncio.run(asyncio.wait_for(ask(), 10))
    assert_all_free(worker.engine)


def test_nobody_waits_for_a_thread_that_has_died(monkeypatch):
    worker = Worker(make_engine())
    worker.start()
    monkeypatch.setattr(worker, "_pass_on", lambda event: 1 / 0)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    with pytest.raises(NotServing):
        asyncio.run(asyncio.wait_for(answer(worker, [5]), 10))
    assert not worker.is_healthy
    worker.stop()
