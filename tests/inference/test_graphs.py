"""Decoding steps at fixed shapes: what CUDA graphs replay, run eagerly on a CPU; on a GPU the graphs themselves."""

from __future__ import annotations

import pytest
import torch
from tiny import HIERARCHIES, photon_model, tokens

from photon_train.errors import PhotonError
from photon_train.inference.engine import Engine, EngineSettings
from photon_train.inference.request import SamplingParams
from photon_train.inference.runner import Runner

LENGTHS = (1, 16, 29, 5, 44)


def engine(model, **settings) -> Engine:
    return Engine(model, settings=EngineSettings(max_length=64, page_tokens=2 * model.config.top_span, **settings))


def static(model, **settings) -> Engine:
    """An engine whose steps have fixed shapes."""
    one = engine(model, **settings)
    if model.device.type == "cpu":
        one.runner = Runner(model, one.cache, one.static_parts(capture=False))
    return one


def answers(one: Engine) -> list[list[int]]:
    prompts = [tokens(1, length, seed=length)[0].tolist() for length in LENGTHS]
    # Different ends: the number of rows changes while others go on.
    params = [SamplingParams(max_new_tokens=9 + 4 * index, ignore_eos=True) for index in range(len(prompts))]
    return [answer[0].tokens for answer in one.generate(prompts, params)]


@pytest.mark.parametrize("name", sorted(HIERARCHIES))
def test_fixed_shapes_change_no_token(name):
    model = photon_model(name)
    one = static(model, max_sequences=5, max_prefixes=0)
    assert answers(one) == answers(engine(model, max_sequences=5, max_prefixes=0, cuda_graphs="off"))
    buckets = {bucket for part, _, bucket, *_ in one.runner.stepper.run.calls if part == "_head"}
    assert buckets == {1, 2, 4, 5}


def test_parts_run_for_the_rows_that_need_them_alone():
    """Level 2 closes once in 4 tokens, level 1 once in 2; a call takes no more rows than the bucket of those."""
    model = photon_model("residual-2-decoder")
    one = static(model, max_sequences=8, max_prefixes=0)
    run, counts = one.runner.stepper.run, {}

    def counted(part, level, rows, *tensors):
        counts[part.__name__, level] = counts.get((part.__name__, level), 0) + rows.numel()
        return run(part, level, rows, *tensors)

    one.runner.stepper.run = counted
    one.generate([tokens(1, 4 + index)[0].tolist() for index in range(8)], SamplingParams(max_new_tokens=33))
    fed = counts["_feed_stream", 0]
    assert fed == 8 * 32
    assert counts["_close", 0] == fed // 2 and counts["_close", 1] == fed // 4


def test_a_bucket_holds_the_rows():
    parts = static(photon_model("memory-1"), max_sequences=12).runner.stepper.run
    assert [parts.bucket(number) for number in (1, 2, 3, 5, 8, 9, 12)] == [1, 2, 4, 8, 8, 12, 12]


def test_pages_are_read_in_few_different_numbers():
    table = static(photon_model("memory-1"), max_sequences=2).cache.table
    width = table.pages.shape[1]
    bounds = set()
    for number in range(1, width + 1):
        table.begin([type("Held", (), {"pages": [0] * number})])
        assert number <= table.bound <= min(width, max(2, 1.5 * number))
        bounds.add(table.bound)
    assert bounds == {1, 2, 3, 4, 6, 8}


def test_unknown_setting_is_refused():
    with pytest.raises(PhotonError, match="cuda_graphs='on' is not auto or off"):
        EngineSettings(cuda_graphs="on")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("name", ["block-2", "memory-3-full", "residual-2-decoder", "slots-2-decoder"])
def test_graphs_change_no_token(name, backend):
    model = photon_model(name).to("cuda")
    model.set_backend(backend)
    one = engine(model, max_sequences=5, max_prefixes=0)
    assert answers(one) == answers(engine(model, max_sequences=5, max_prefixes=0, cuda_graphs="off"))
    parts = one.runner.stepper.run
    assert parts.capture and any(call.graph is not None for call in parts.calls.values())
    torch.cuda.synchronize()
