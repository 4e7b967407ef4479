"""What a finished request has left in rows and blocks is multiplied into nobody's result, were it NaN."""

from __future__ import annotations

import pytest
import torch
from tiny import GRAFTS, photon_model, tokens
from tiny_hierarchical import hierarchical_model

from photon_train.inference.blocks import Allocation, BlockTable
from photon_train.inference.engine import Engine, EngineSettings
from photon_train.inference.request import Completion, SamplingParams
from photon_train.inference.runner import Runner


def poison(engine: Engine) -> None:
    """NaN (or, of codes, their largest) in everything that belongs to no sequence."""
    cache = engine.cache
    free = [block for block, count in enumerate(cache.pool.references) if not count]
    for stored in (states for store in cache.state.growing() for states in store.tensors()):
        stored[free] = torch.nan if stored.is_floating_point() else 255
    for states in cache.state.row_tensors():
        if states.is_floating_point():
            states[cache._free_rows] = torch.nan


def answers(model, dirty: bool, static: bool = False, small: bool = False) -> list[Completion]:
    """Requests of several lengths, one of them twice, two of them with a common beginning, more than run at a time."""
    span = model.config.chunk_size if getattr(model.config, "memory_layers", None) else 1
    settings = EngineSettings(
        max_sequences=3,
        max_prefixes=2,
        max_length=64,
        block_size=2 * span if hasattr(model.config, "memory_layers") else None,
        segment_tokens=8,
        cuda_graphs="off",
    )
    engine = Engine(model, settings=settings)
    if static:
        engine.runner = Runner(model, engine.cache, engine.static_calls(capture=False))
    step = engine.step

    def on_dirty_memory():
        poison(engine)
        return step()

    engine.step = on_dirty_memory if dirty else step
    common = tokens(1, 9, seed=7)[0].tolist()
    prompts = [tokens(1, length, seed=length)[0].tolist() for length in ((3, 13) if small else (3, 9, 1, 17, 5))]
    prompts += [common + prompt for prompt in prompts[: 1 if small else 2]]
    params = [
        SamplingParams(max_new_tokens=3 + (1 if small else 2) * index, n=1 + (index == 1), ignore_eos=True)
        for index in range(len(prompts))
    ]
    return [answer for answers in engine.generate(prompts, params) for answer in answers]


def assert_clean(model, static: bool, small: bool = False) -> None:
    expected, found = (answers(model, dirty, static, small) for dirty in (False, True))
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.tokens == theirs.tokens
        assert mine.logprobs == theirs.logprobs


@pytest.mark.parametrize("static", [False, True], ids=["as it is", "fixed shapes"])
@pytest.mark.parametrize("name", sorted(GRAFTS))
def test_nan_in_free_memory_changes_nothing(name, static):
    assert_clean(photon_model(name), static)


@pytest.mark.parametrize("name", ["block-2", "stream-2-slots", "stream-3"])
def test_nan_in_free_memory_changes_nothing_in_hierarchies(name):
    assert_clean(hierarchical_model(name), static=False)


@pytest.mark.parametrize("static", [False, True], ids=["as it is", "fixed shapes"])
def test_nan_in_free_memory_changes_nothing_on_triton(static, triton_device):
    model = photon_model("memory-full").to(triton_device)
    model.set_backend("triton")
    assert_clean(model, static, small=True)


def test_a_request_that_overflows_leaves_nothing():
    """A sequence whose states are NaN beside others, whose row and blocks others take over."""
    model = photon_model("memory-full")
    with torch.no_grad():
        model.get_input_embeddings().weight[3] = torch.inf
    prompts = [[3] * 21, *(tokens(1, length, seed=length)[0].add(1).clamp(4, 60).tolist() for length in (7, 17, 5, 19))]
    settings = EngineSettings(max_sequences=2, max_prefixes=1, max_length=64, block_size=8, cuda_graphs="off")
    params = SamplingParams(max_new_tokens=8, ignore_eos=True)
    together = Engine(model, settings=settings).generate(prompts, params)
    assert together[0][0].finish_reason == "error" and together[0][0].tokens == []
    assert "logits are not finite" in together[0][0].error
    for prompt, (answer,) in zip(prompts[1:], together[1:], strict=True):
        ((alone,),) = Engine(model, settings=settings).generate([prompt], params)
        assert answer.tokens == alone.tokens
        torch.testing.assert_close(torch.tensor(answer.logprobs), torch.tensor(alone.logprobs), atol=2e-4, rtol=0)


def test_a_row_of_the_table_names_its_own_blocks_alone():
    table = BlockTable(3, torch.device("cpu"))
    first, second = Allocation(0, [7]), Allocation(2, [4, 9, 5])
    table.set(first)
    table.set(second)  # wider than the table was
    table.widen(8)
    first.blocks += [3, 8]
    table.set(first, 1)
    assert table.blocks[0].tolist() == [7, 3, 8, 8, 8, 8, 8, 8]
    assert table.blocks[2].tolist() == [4, 9, 5, 5, 5, 5, 5, 5]
    second.blocks = [6]  # another sequence in the row of the second
    table.set(second)
    assert table.blocks[2].tolist() == [6] * 8


def test_what_has_overflowed_is_not_kept_as_a_prefix():
    model = photon_model("memory-full")
    embedding = model.get_input_embeddings().weight
    settings = EngineSettings(max_sequences=1, max_prefixes=4, max_length=64, segment_tokens=8, cuda_graphs="off")
    engine, prompt = Engine(model, settings=settings), [3] * 21
    params = SamplingParams(max_new_tokens=2, n=2, ignore_eos=True)
    ((expected, _),) = Engine(model, settings=settings).generate([prompt], params)
    with torch.no_grad():
        saved, embedding[3] = embedding[3].clone(), torch.inf
        assert [one.error is None for one in engine.generate([prompt], params)[0]] == [False, False]
        assert len(engine.prefixes) == 0 and not any(engine.cache.pool.references)
        embedding[3] = saved  # the same prompt, computed again
    ((answer, _),) = engine.generate([prompt], params)
    assert answer.tokens == expected.tokens
