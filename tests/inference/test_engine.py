"""The engine: every request gets what it would get alone, and what `generate` writes, whatever happens around it."""

from __future__ import annotations

import pytest
import torch
from tiny import tokens
from tiny_models import ALL, SOME, tiny_model, unit_tokens

from photon_train.errors import PhotonError
from photon_train.inference.cache import CacheLayout
from photon_train.inference.engine import Engine, EngineSettings
from photon_train.inference.request import SamplingParams
from photon_train.inference.settings import decode_bytes

NEW = 11
BLOCK = 12  # tokens, about


def greedy(model, prompt: list[int], new: int = NEW) -> list[int]:
    """What transformers' generate writes."""
    ids = torch.tensor([prompt])
    out = model.generate(ids, max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=2)
    return out[0, len(prompt) :].tolist()


def greedy_batch(model, prompts: list[list[int]], new: int) -> list[list[int]]:
    """The same for many prompts, padded on the left."""
    width = max(map(len, prompts))
    ids = torch.tensor([[2] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    settings = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}
    return model.generate(ids, attention_mask=mask, **settings)[:, width:].tolist()


def quiet(model):
    """Without an end token: every answer has the same length."""
    model.generation_config.eos_token_id = None
    return model


def small_blocks(model, num_blocks: int, rows: int, **settings) -> EngineSettings:
    """Settings whose cache holds `num_blocks` blocks of `BLOCK` tokens, rounded up to whole units."""
    size = block_size(model)
    fitted = CacheLayout.fit(model, 2**40, rows, size)
    return EngineSettings(memory=num_blocks * fitted.block_bytes + rows * fitted.row_bytes, block_size=size, **settings)


def block_size(model) -> int:
    unit = unit_tokens(model)
    return -(-BLOCK // unit) * unit


def prompts_with_common_beginnings(count: int) -> list[list[int]]:
    """Prompts of 1 to 40 tokens, some equal, some with a common beginning."""
    common = tokens(1, 40, seed=99)[0].tolist()
    prompts = []
    for index in range(count):
        own = tokens(1, 1 + 7 * (index // 2) % 23, seed=index // 2)[0].tolist()
        prompts.append(common[: 24 + index % 3] + own[:9] if index % 4 == 0 else own)
    return prompts


@pytest.mark.parametrize("name", ALL)
def test_chunked_prefill_and_decoding_equal_generate(name):
    """Segments of one token and of five: rings, units, open chunks and groups are carried over every boundary."""
    model = quiet(tiny_model(name))
    prompts = [tokens(1, length, seed=length)[0].tolist() for length in (1, 16, 29)]
    expected = [greedy(model, prompt) for prompt in prompts]
    for size in (1, 5):
        settings = EngineSettings(max_sequences=3, max_prefixes=0, max_length=64, segment_tokens=size)
        answers = Engine(model, settings=settings).generate(prompts, SamplingParams(max_new_tokens=NEW))
        assert [answer[0].tokens for answer in answers] == expected


@pytest.mark.parametrize("name", SOME)
def test_mixed_batch_of_64_with_preemption_and_prefix_hits_equals_each_alone(name):
    model = quiet(tiny_model(name))
    prompts = prompts_with_common_beginnings(64)
    # Room for four of the longest: ten running ones must give way to each other.
    num_blocks = 4 * -(-56 // block_size(model))
    settings = small_blocks(model, num_blocks, 14, max_sequences=10, max_prefixes=4, segment_tokens=12, step_tokens=30)
    engine = Engine(model, settings=settings)
    params = [SamplingParams(max_new_tokens=NEW + index % 5) for index in range(64)]
    # Some requests arrive while others are on their way.
    numbers = [engine.add(prompt, one) for prompt, one in zip(prompts[:40], params, strict=False)]
    for _ in range(7):
        engine.step()
    numbers += [engine.add(prompt, one) for prompt, one in zip(prompts[40:], params[40:], strict=True)]
    while engine.has_work:
        engine.step()
    expected = greedy_batch(model, prompts, NEW + 4)
    for number, tokens_alone, one in zip(numbers, expected, params, strict=True):
        assert engine.result(number)[0].tokens == tokens_alone[: one.max_new_tokens]
    assert engine.prefixes.hit_tokens > 0
    assert engine.scheduler.num_preemptions > 0
    # Alone in an engine with room: the same.
    alone = Engine(model, settings=EngineSettings(max_sequences=1, max_length=64))
    for index in (0, 5, 63):
        assert expected[index][:NEW] == greedy(model, prompts[index])
        (answer,) = alone.generate([prompts[index]], SamplingParams(max_new_tokens=NEW))
        assert answer[0].tokens == expected[index][:NEW]


def test_everything_is_given_back():
    model = quiet(tiny_model("memory-full"))
    engine = Engine(model, settings=small_blocks(model, 20, 8, max_sequences=5, max_prefixes=3, segment_tokens=16))
    engine.generate(prompts_with_common_beginnings(12), SamplingParams(max_new_tokens=9, n=2))
    while engine.prefixes.evict():
        pass
    assert engine.cache.pool.num_free == engine.cache.layout.num_blocks
    assert engine.cache.num_free_rows == engine.cache.layout.num_rows
    assert not any(engine.cache.pool.references)


def test_an_interrupted_call_leaves_nothing_behind():
    model = quiet(tiny_model("memory-full"))
    engine = Engine(model, settings=EngineSettings(max_sequences=2, max_prefixes=0, max_length=64))
    step, steps = engine.step, []

    def interrupted():
        steps.append(None)
        if len(steps) == 4:
            raise KeyboardInterrupt
        return step()

    engine.step = interrupted
    with pytest.raises(KeyboardInterrupt):
        engine.generate([[5, 6], [7], [8]], SamplingParams(max_new_tokens=9))
    assert not engine.has_work and not engine.scheduler.running and not engine.scheduler.waiting
    assert engine.cache.pool.num_free == engine.cache.layout.num_blocks


def test_equal_prompts_are_encoded_once():
    model = quiet(tiny_model("memory"))
    fed = []
    engine = Engine(model, settings=EngineSettings(max_sequences=4, max_length=128, segment_tokens=16))
    prefill = engine.runner.prefill
    engine.runner.prefill = lambda work, scored: fed.extend(ids for _, ids in work) or prefill(work, scored)
    prompt = tokens(1, 39)[0].tolist()
    answers = engine.generate([prompt] * 7, SamplingParams(max_new_tokens=5))
    assert [len(ids) for ids in fed] == [16, 16, 7]
    assert {tuple(answer[0].tokens) for answer in answers} == {tuple(greedy(model, prompt, 5))}
    # Another prompt with the same beginning: only what differs is encoded.
    other = prompt[:35] + tokens(1, 6, seed=5)[0].tolist()
    assert engine.generate([other], SamplingParams(max_new_tokens=5))[0][0].tokens == greedy(model, other, 5)
    assert [len(ids) for ids in fed[3:]] == [9]
    # The beginning of a known prompt is another prompt: its last logits are not kept.
    assert engine.generate([prompt[:32]], SamplingParams(max_new_tokens=5))[0][0].tokens == (
        greedy(model, prompt[:32], 5)
    )
    assert [len(ids) for ids in fed[4:]] == [16]


def test_continuations_share_the_prompt_and_differ_by_their_random_numbers():
    model = quiet(tiny_model("memory-full"))
    engine = Engine(model, settings=EngineSettings(max_sequences=8, max_length=128, block_size=16))
    prompt = tokens(1, 37)[0].tolist()
    number = engine.add(prompt, SamplingParams(max_new_tokens=6, n=6, temperature=1.0, seed=3))
    for _ in range(3):
        engine.step()
    running = [sequence.allocation for sequence in engine.scheduler.running]
    assert len(running) == 6 and len({one.row for one in running}) == 6
    assert len({tuple(one.blocks[:2]) for one in running}) == 1 and len({one.blocks[2] for one in running}) == 6
    while engine.has_work:
        engine.step()
    answers = engine.result(number)
    assert [answer.index for answer in answers] == list(range(6))
    assert len({tuple(answer.tokens) for answer in answers}) > 4


def test_sampling_does_not_depend_on_neighbours_or_preemption():
    model = quiet(tiny_model("stream-2-slots"))
    prompts = prompts_with_common_beginnings(9)
    params = [SamplingParams(max_new_tokens=9, temperature=0.9, top_k=20, n=2, seed=index) for index in range(9)]
    roomy = Engine(model, settings=EngineSettings(max_sequences=1, max_prefixes=0, max_length=64))
    alone = [roomy.generate([prompt], one)[0] for prompt, one in zip(prompts, params, strict=True)]
    # Room for two of the longest sequences.
    settings = small_blocks(model, 2 * -(-40 // block_size(model)), 10, max_sequences=8, max_prefixes=2)
    crowded = Engine(model, settings=settings)
    together = crowded.generate(prompts, params)
    assert crowded.scheduler.num_preemptions > 0
    for first, second in zip(alone, together, strict=True):
        assert [answer.tokens for answer in first] == [answer.tokens for answer in second]


def test_later_requests_do_not_wait_for_long_prompts():
    """Chunked prefill: a running sequence gets a token in every step while a long prompt is encoded."""
    model = quiet(tiny_model("memory"))
    engine = Engine(model, settings=EngineSettings(max_length=256, segment_tokens=8, step_tokens=8))
    engine.add(tokens(1, 5)[0].tolist(), SamplingParams(max_new_tokens=20))
    engine.step()
    engine.add(tokens(1, 80, seed=1)[0].tolist(), SamplingParams(max_new_tokens=2))
    for step in range(10):
        events = engine.step()
        assert events[0].request_id == 0 and len(events) == (1 if step < 9 else 2)


def test_long_sequences_are_prefilled_by_themselves(monkeypatch):
    model = quiet(tiny_model("memory"))
    prompts = [tokens(1, 32, seed=seed)[0].tolist() for seed in range(4)]
    answers, passes = {}, []

    def counted(segment):
        return lambda work, *wanted: passes.append(len(work)) or segment(work, *wanted)

    for limit in (2**16, 40):
        monkeypatch.setattr("photon_train.inference.runner.PASS_TOKENS", limit)
        engine = Engine(model, settings=EngineSettings(max_prefixes=0, max_length=64, segment_tokens=16))
        engine.runner._segment = counted(engine.runner._segment)
        answers[limit] = engine.generate(prompts, SamplingParams(max_new_tokens=3))
    assert passes == [4, 4] + [2, 2] + [1, 1, 1, 1]
    assert [one[0].tokens for one in answers[40]] == [one[0].tokens for one in answers[2**16]]
    # Where all logits are wanted, they bound a pass.
    monkeypatch.setattr("photon_train.inference.runner.PASS_TOKENS", 2**16)
    monkeypatch.setattr("photon_train.inference.runner.SCORED_TOKENS", 32)
    passes.clear()
    plain, scored = SamplingParams(max_new_tokens=1), SamplingParams(max_new_tokens=1, prompt_logprobs=0)
    engine.generate(prompts, [plain, scored, scored, scored])
    assert passes == [1, 2, 1] * 2


def test_end_tokens_and_abort():
    model = tiny_model("memory")
    prompt = tokens(1, 9)[0].tolist()
    free = greedy(model, prompt)
    model.generation_config.eos_token_id = [free[4]]
    length = free.index(free[4]) + 1
    engine = Engine(model, settings=EngineSettings(max_length=64))
    stopped, ignoring, own = engine.generate(
        [prompt] * 3,
        [
            SamplingParams(max_new_tokens=NEW),
            SamplingParams(max_new_tokens=NEW, ignore_eos=True),
            SamplingParams(max_new_tokens=NEW, ignore_eos=True, stop_token_ids=(free[1],)),
        ],
    )
    assert stopped[0].tokens == free[:length] and stopped[0].finish_reason == "stop"
    assert ignoring[0].tokens == free and ignoring[0].finish_reason == "length"
    assert own[0].tokens == free[: free.index(free[1]) + 1]
    number = engine.add(prompt, SamplingParams(n=3))
    engine.step()
    engine.abort(number)
    assert not engine.has_work and not engine.scheduler.running and not engine.scheduler.waiting
    assert engine.result(number) is None


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], {}, "a prompt is empty"),
        ([3, 61], {}, "token 61 is outside the vocabulary of 61"),
        ("text", {}, "needs a tokenizer"),
        ([3], {"stop": "x"}, "stop needs a tokenizer"),
        ([3] * 40, {"max_new_tokens": 300}, "up to 300 new ones exceed the 258 tokens"),
        ([3] * 40, {"max_new_tokens": 219}, "up to 219 new ones exceed the 258 tokens"),
    ],
)
def test_bad_requests_are_refused(prompt, params, message):
    engine = Engine(tiny_model("memory"), settings=EngineSettings(max_length=64, max_sequences=1, max_prefixes=0))
    with pytest.raises(PhotonError, match=message):
        engine.generate([[5, 6], prompt], SamplingParams(**params))
    assert not engine.has_work and not engine.scheduler.waiting


def test_a_request_may_fill_the_memory():
    engine = Engine(tiny_model("memory"), settings=EngineSettings(max_length=64, max_sequences=1, max_prefixes=0))
    ((found,),) = engine.generate([[3] * 256], SamplingParams(max_new_tokens=2, ignore_eos=True))
    assert engine.longest == 258 and len(found.tokens) == 2


def test_a_gpus_free_memory_also_holds_the_weights_of_latents(monkeypatch):
    free = 2**25
    monkeypatch.setattr("photon_train.inference.settings.free_memory", lambda device: free)
    model, blocks = tiny_model("memory"), {}
    for backend in ("torch", "triton"):
        model.model.backend = backend
        engine = Engine(model, settings=EngineSettings(max_sequences=100, max_length=2**13, cuda_graphs="off"))
        layout = engine.cache.layout
        blocks[backend] = layout.num_blocks
        room = int(0.9 * free) - decode_bytes(model, 100, layout.blocks_for(2**13) * layout.block_size)
        assert 0 <= room - layout.total_bytes < layout.block_bytes
    # 100 rows, 4 heads and 8,192 tokens: 13 MB in fp32.
    assert blocks["triton"] < blocks["torch"]
    free = 2**23
    with pytest.raises(PhotonError, match="lower max_sequences or max_length"):
        Engine(model, settings=EngineSettings(max_sequences=100, max_length=2**13))


def test_the_weights_of_latents_are_those_of_the_widest_layer():
    """Of the query heads that read them alone: one layer decodes at a time."""
    needed = {}
    for cells in ({2: [0]}, {0: [1], 2: [0]}, {0: [1], 2: [0, 1]}, {}):
        model = tiny_model("memory", memory_cells=cells)
        assert decode_bytes(model, 100, 3072) == 0
        model.model.backend = "triton"
        needed[sum(map(len, cells.values()))] = decode_bytes(model, 100, 3072)
    assert needed[1] == needed[2] == needed[3] / 2 and needed[0] == 0
    # 100 rows, 2 of 4 heads and 3,072 tokens: a weight in fp32, and what the tiles of units add.
    assert 100 * 2 * 3072 * 4 < needed[1] < 1.4 * 100 * 2 * 3072 * 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"memory": 100}, "memory=100 does not hold"),
        ({"memory": "3 apples"}, "memory is '3 apples', which is no size"),
        ({"max_sequences": 0}, "max_sequences=0 must be at least 1"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(PhotonError, match=message):
        Engine(tiny_model("memory"), settings=EngineSettings(**settings))
