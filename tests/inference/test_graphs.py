"""Decoding steps at fixed shapes: what CUDA graphs replay, run eagerly on a CPU; on a GPU the graphs themselves."""

from __future__ import annotations

import pytest
import torch
from tiny import tokens
from tiny_models import ALL, tiny_model, unit_tokens

from photon_train.errors import PhotonError
from photon_train.inference.blocks import Allocation
from photon_train.inference.engine import Engine, EngineSettings
from photon_train.inference.request import SamplingParams
from photon_train.inference.runner import Runner

LENGTHS = (1, 16, 29, 5, 44)


def engine(model, **settings) -> Engine:
    return Engine(model, settings=EngineSettings(max_length=64, block_size=2 * unit_tokens(model), **settings))


def static(model, **settings) -> Engine:
    """An engine whose steps have fixed shapes."""
    one = engine(model, **settings)
    if model.device.type == "cpu":
        one.runner = Runner(model, one.cache, one.static_calls(capture=False))
    return one


def answers(one: Engine) -> list[list[int]]:
    prompts = [tokens(1, length, seed=length)[0].tolist() for length in LENGTHS]
    # Different ends: the number of rows changes while others go on.
    params = [SamplingParams(max_new_tokens=9 + 4 * index, ignore_eos=True) for index in range(len(prompts))]
    return [answer[0].tokens for answer in one.generate(prompts, params)]


@pytest.mark.parametrize("name", ALL)
def test_fixed_shapes_change_no_token(name):
    model = tiny_model(name)
    one = static(model, max_sequences=5, max_prefixes=0)
    assert answers(one) == answers(engine(model, max_sequences=5, max_prefixes=0, cuda_graphs="off"))
    assert {bucket for _, bucket, *_ in one.runner.static.calls} >= {1, 2, 4, 5}


def test_pieces_run_for_the_rows_that_need_them_alone():
    """Level 2 closes once in 4 tokens, level 1 once in 2; a call takes no more rows than the bucket of those."""
    one = static(tiny_model("stream-2"), max_sequences=8, max_prefixes=0)
    counts, call = {}, one.runner.static.__call__

    class Counted(type(one.runner.static)):
        def __call__(self, name, function, rows, *tensors):
            counts[name] = counts.get(name, 0) + rows.numel()
            return call(name, function, rows, *tensors)

    one.runner.static.__class__ = Counted
    prompts = [tokens(1, 4 + index)[0].tolist() for index in range(8)]
    one.generate(prompts, SamplingParams(max_new_tokens=33, ignore_eos=True))
    steps = 8 * 32
    assert counts["_close 0"] == steps // 2 and counts["_close 1"] == steps // 4
    # The token decoder takes every token, and the slots of the chunk that follows a completed one.
    assert counts["_feed 0"] == steps + steps // 2


def test_a_bucket_holds_the_rows():
    calls = static(tiny_model("memory"), max_sequences=12).runner.static
    assert [calls.bucket(number) for number in (1, 2, 3, 5, 8, 9, 12)] == [1, 2, 4, 8, 8, 12, 12]


def test_blocks_are_read_in_few_different_numbers():
    table = static(tiny_model("memory"), max_sequences=2).cache.table
    width = table.blocks.shape[1]
    bounds = set()
    for number in range(1, width + 1):
        table.begin([Allocation(0, [0] * number)])
        assert number <= table.bound <= min(width, max(2, 1.5 * number))
        bounds.add(table.bound)
    assert bounds == {1, 2, 3, 4, 6, 8, width} and width == 11


def test_unknown_setting_is_refused():
    with pytest.raises(PhotonError, match="cuda_graphs='on' is not auto or off"):
        EngineSettings(cuda_graphs="on")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("name", ["block-2", "memory-full", "memory", "stream-2-slots"])
def test_graphs_change_no_token(name, backend):
    model = tiny_model(name).to("cuda")
    model.set_backend(backend)
    one = engine(model, max_sequences=5, max_prefixes=0)
    assert answers(one) == answers(engine(model, max_sequences=5, max_prefixes=0, cuda_graphs="off"))
    calls = one.runner.static
    assert calls.capture and any(call.graph is not None for call in calls.calls.values())
    torch.cuda.synchronize()
