"""Log-probabilities of prompts: in the engine, and as the server gives them with `echo` and `prompt_logprobs`."""

from __future__ import annotations

import json

import pytest
import torch
from tiny import photon_model
from tiny_checkpoint import byte_tokenizer
from tiny_models import SOME, tiny_model, unit_tokens

from photon_train.inference.engine import Engine, EngineSettings
from photon_train.inference.request import SamplingParams

TestClient = pytest.importorskip("fastapi.testclient").TestClient
create_app = pytest.importorskip("photon_train.inference.server").create_app

PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12, 13], [5, 6, 7, 8, 9, 14], [20], [21, 22, 23], [5, 6, 7, 8, 9, 10, 11, 12, 13]]


def expected(model, prompt: list[int]) -> torch.Tensor:
    """Log-probabilities ``[T - 1, V]`` of what follows each token but the last, by one pass without a cache."""
    with torch.no_grad():
        return model(torch.tensor([prompt]), use_cache=False).logits[0, :-1].log_softmax(-1)


@pytest.mark.parametrize("name", SOME)
def test_prompts_are_scored_as_by_a_whole_pass(name, monkeypatch):
    """In segments, beside prompts that are not, with prefixes kept before."""
    model = tiny_model(name)
    monkeypatch.setattr("photon_train.inference.sampler.SCORED_AT_ONCE", 2 * model.config.vocab_size)
    unit = unit_tokens(model)
    sizes = {"max_sequences": 3, "max_prefixes": 4, "max_length": 48, "block_size": unit * 2, "segment_tokens": 4}
    engine = Engine(model, settings=EngineSettings(**sizes))
    plain = SamplingParams(max_new_tokens=4, ignore_eos=True)
    scored = SamplingParams(max_new_tokens=4, ignore_eos=True, prompt_logprobs=2)
    before = [one.tokens for (one,) in engine.generate(PROMPTS, plain)]
    assert len(engine.prefixes)
    params = [scored, plain, scored, scored, scored]
    for prompt, settings, tokens, (one,) in zip(PROMPTS, params, before, engine.generate(PROMPTS, params), strict=True):
        assert one.tokens == tokens
        if settings is plain:
            assert one.prompt_scores == []
            continue
        rows = expected(model, prompt)
        assert [score.token for score in one.prompt_scores] == prompt[1:]
        for row, score in zip(rows, one.prompt_scores, strict=True):
            assert score.logprob == pytest.approx(float(row[score.token]), abs=1e-4)
            assert score.rank == 1 + int((row > row[score.token]).sum())
            assert list(score.top) == row.topk(2).indices.tolist()
            assert list(score.top.values()) == pytest.approx(row.topk(2).values.tolist(), abs=1e-4)


def test_equal_prompts_that_are_scored_do_not_wait_for_each_other():
    engine = Engine(photon_model("memory"), settings=EngineSettings(max_sequences=2, max_length=48, segment_tokens=4))
    for _ in range(2):
        engine.add(PROMPTS[0], SamplingParams(max_new_tokens=2, prompt_logprobs=0))
    engine.step()
    assert len(engine.scheduler.running) == 2


def test_a_prompt_swapped_out_within_is_scored_once():
    model = photon_model("memory")
    engine = Engine(model, settings=EngineSettings(max_sequences=2, max_length=48, segment_tokens=4, step_tokens=4))
    engine.add(PROMPTS[0], SamplingParams(max_new_tokens=2, prompt_logprobs=0, ignore_eos=True))
    engine.step()
    assert engine.scheduler.running[0].in_prefill
    engine.scheduler._preempt(engine.scheduler.running[0])
    while engine.has_work:
        engine.step()
    scores = engine.result(0)[0].prompt_scores
    rows = expected(model, PROMPTS[0])
    assert [score.token for score in scores] == PROMPTS[0][1:]
    values = [float(row[token]) for row, token in zip(rows, PROMPTS[0][1:], strict=True)]
    assert [score.logprob for score in scores] == pytest.approx(values, abs=1e-4)


def test_what_overflows_in_the_prompt_alone_fails_the_request(monkeypatch):
    engine = Engine(photon_model("memory"), settings=EngineSettings(max_sequences=2, max_length=48))
    prefill = engine.runner._forward

    def broken(*args):
        logits = prefill(*args)
        if logits.shape[1] > 1:
            logits[:, 1] = torch.nan
        return logits

    monkeypatch.setattr(engine.runner, "_forward", broken)
    (failed,), (right,) = engine.generate(
        [[5, 6, 7, 8], [5, 6, 7]], [SamplingParams(2, prompt_logprobs=0), SamplingParams(2, ignore_eos=True)]
    )
    assert failed.finish_reason == "error" and "not finite" in failed.error and right.finish_reason == "length"


# --- the server ---

TEXT = "Ein Maß, déjà vu"


@pytest.fixture(scope="module")
def model():
    model = photon_model("memory", vocab_size=len(byte_tokenizer()))
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture(scope="module")
def client(model):
    engine = Engine(model, byte_tokenizer(), EngineSettings(max_sequences=4, max_length=64, segment_tokens=8))
    with TestClient(create_app(engine, "tiny"), raise_server_exceptions=False) as client:
        yield client


def ask(client, **body):
    answer = client.post("/v1/completions", json={"temperature": 0, **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_an_echo_holds_the_prompts_log_probabilities(client, model):
    """As lm-evaluation-harness reads them."""
    ids = byte_tokenizer()(TEXT)["input_ids"]
    answer = ask(client, prompt=[ids, ids], max_tokens=1, logprobs=1, echo=True)
    text = ask(client, prompt=TEXT, max_tokens=1, logprobs=1, echo=True)
    new = ask(client, prompt=TEXT, max_tokens=1, logprobs=1)["choices"][0]
    assert answer["usage"] == {"prompt_tokens": 2 * len(ids), "completion_tokens": 2, "total_tokens": 2 * len(ids) + 2}
    rows = expected(model, ids)
    for choice in [*answer["choices"], *text["choices"]]:
        assert choice["text"] == TEXT + new["text"] and "prompt_logprobs" not in choice
        logprobs = choice["logprobs"]
        assert {len(values) for values in logprobs.values()} == {len(ids) + 1}
        assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
        assert logprobs["token_logprobs"][1:-1] == pytest.approx(rows[range(len(ids) - 1), ids[1:]].tolist(), abs=1e-4)
        for row, top in zip(rows, logprobs["top_logprobs"][1:-1], strict=True):
            assert list(top.values()) == pytest.approx([float(row.max())], abs=1e-4)
        assert {key: values[-1] for key, values in logprobs.items()} == {
            **{key: values[0] for key, values in new["logprobs"].items()},
            "token_logprobs": pytest.approx(new["logprobs"]["token_logprobs"][0], abs=1e-4),
            "top_logprobs": {key: pytest.approx(v, abs=1e-4) for key, v in new["logprobs"]["top_logprobs"][0].items()},
            "text_offset": len(TEXT),
        }
        # The pieces of a character begin where it does, or behind it.
        for token, offset in zip(logprobs["tokens"][:-1], logprobs["text_offset"], strict=False):
            assert token.startswith("bytes:") or TEXT[offset] == token


def test_an_echo_alone(client):
    choice = ask(client, prompt=TEXT, max_tokens=0, logprobs=0, echo=True)["choices"][0]
    assert choice["text"] == TEXT and len(choice["logprobs"]["tokens"]) == len(TEXT.encode())
    assert set(map(str, choice["logprobs"]["top_logprobs"][1:])) == {"{}"}
    answer = ask(client, prompt="Ein<|end|>", max_tokens=0, echo=True)
    assert answer["choices"][0]["text"] == "Ein<|end|>" and answer["choices"][0]["logprobs"] is None
    assert answer["usage"]["completion_tokens"] == 0


def test_an_echo_is_streamed_with_the_first_token(client):
    body = {"prompt": [TEXT, "du"], "max_tokens": 3, "logprobs": 1, "echo": True, "n": 2, "seed": 3, "temperature": 1}
    whole = ask(client, **body)
    with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    pieces = [json.loads(line)["choices"][0] for line in lines[:-1]]
    for choice in whole["choices"]:
        mine = [piece for piece in pieces if piece["index"] == choice["index"]]
        assert "".join(piece["text"] for piece in mine) == choice["text"]
        for key, values in choice["logprobs"].items():
            found = [value for piece in mine for value in piece["logprobs"][key]]
            if "logprobs" not in key:
                assert found == values
            assert len(found) == len(values)


def test_prompt_logprobs_come_in_vllms_shape(client, model):
    ids = byte_tokenizer()(TEXT)["input_ids"]
    choice = ask(client, prompt=ids, max_tokens=2, prompt_logprobs=2)["choices"][0]
    assert choice["logprobs"] is None and choice["prompt_logprobs"][0] is None
    assert len(choice["text"]) and not choice["text"].startswith("Ein")
    for row, token, found in zip(expected(model, ids), ids[1:], choice["prompt_logprobs"][1:], strict=True):
        best = row.topk(2).indices.tolist()
        assert set(found) == set(map(str, [token, *best]))
        assert [found[str(one)]["rank"] for one in best] == [1, 2]
        own = found[str(token)]
        assert own["logprob"] == pytest.approx(float(row[token]), abs=1e-4)
        assert own["rank"] == 1 + int((row > row[token]).sum()) and own["decoded_token"]


def test_more_beside_the_prompt_than_beside_the_answer(client):
    choice = ask(client, prompt=TEXT, max_tokens=1, logprobs=1, prompt_logprobs=3, echo=True)["choices"][0]
    assert {len(top) for top in choice["logprobs"]["top_logprobs"][1:]} == {1}
    assert all(len(found) >= 3 for found in choice["prompt_logprobs"][1:])
