"""The HTTP server: OpenAI's shapes, the engine's tokens, clients that leave, errors."""

from __future__ import annotations

import json
import runpy
import socket
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest
import torch
from tiny import photon_model
from tiny_tokenizer import word_tokenizer

from photon_train.inference.engine import Engine, EngineSettings
from photon_train.inference.request import SamplingParams

uvicorn = pytest.importorskip("uvicorn")
TestClient = pytest.importorskip("fastapi.testclient").TestClient
create_app = pytest.importorskip("photon_train.inference.server").create_app

TEMPLATE = (
    "{% if mood %}{{ mood + ' ' }}{% endif %}"
    "{% for m in messages %}{% if m['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "{{ m['content'] + ' ' }}{% endfor %}{% if add_generation_prompt %}t09{% endif %}"
)


USER = {"role": "user", "content": "t05"}
JSON = {"content-type": "application/json"}


def make_engine(template: str | None = TEMPLATE) -> Engine:
    model = photon_model("memory")
    model.generation_config.eos_token_id = None
    tokenizer = word_tokenizer()
    tokenizer.chat_template = template
    # Four blocks of 33 tokens.
    settings = EngineSettings(max_length=32, block_size=33, max_sequences=4, max_prefixes=0)
    return Engine(model, tokenizer, settings)


@pytest.fixture(scope="module")
def app():
    return create_app(make_engine(), "tiny")


@pytest.fixture(scope="module")
def client(app):
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


def greedy(prompt: str | list[int], new: int, **settings):
    return make_engine().generate([prompt], SamplingParams(max_new_tokens=new, **settings))[0][0]


def chunks(response) -> list[dict]:
    lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def test_models_and_health(client):
    entry = client.get("/v1/models").json()["data"][0]
    assert entry["id"] == "tiny" and entry["object"] == "model" and entry["max_model_len"] == 132
    assert client.get("/health").json() == {"status": "ok", "open_requests": 0}


def test_completion(client):
    body = {"model": "tiny", "prompt": "t05 t06 t07", "max_tokens": 6, "temperature": 0, "logprobs": 2}
    answer = client.post("/v1/completions", json=body).json()
    expected = greedy("t05 t06 t07", 6, top_logprobs=2)
    assert answer["object"] == "text_completion" and answer["model"] == "tiny" and answer["id"].startswith("cmpl-")
    assert answer["usage"] == {"prompt_tokens": 3, "completion_tokens": 6, "total_tokens": 9}
    choice = answer["choices"][0]
    assert choice["text"] == expected.text and choice["finish_reason"] == "length" and choice["index"] == 0
    assert choice["logprobs"]["tokens"] == [f"t{token:02d}" for token in expected.tokens]
    assert choice["logprobs"]["token_logprobs"] == pytest.approx(expected.logprobs, abs=1e-5)
    assert all(len(top) == 2 for top in choice["logprobs"]["top_logprobs"])
    for place, offset in enumerate(choice["logprobs"]["text_offset"]):
        written = choice["logprobs"]["tokens"][place]
        # t00 to t02 are special and not part of the text.
        assert written in ("t00", "t01", "t02") or choice["text"][offset:].strip().startswith(written)


def test_prompts_and_continuations_are_numbered(client):
    body = {"prompt": [[5, 6], [7, 8, 9]], "max_tokens": 4, "n": 2, "seed": 3}
    answer = client.post("/v1/completions", json=body).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert answer["usage"]["prompt_tokens"] == 5 and answer["usage"]["completion_tokens"] == 16
    texts = [choice["text"] for choice in answer["choices"]]
    assert len(set(texts)) == 4
    again = client.post("/v1/completions", json=body).json()
    assert [choice["text"] for choice in again["choices"]] == texts
    assert client.post("/v1/completions", json={**body, "seed": None}).json()["choices"] != answer["choices"]


def test_prompts_reach_the_engine_together():
    """Not one in each of its steps."""
    engine, open_requests = make_engine(), []
    step = engine.step
    engine.step = lambda: open_requests.append(len(engine._open)) or step()
    with TestClient(create_app(engine, "tiny")) as client:
        client.post("/v1/completions", json={"prompt": [[5], [6], [7], [8]], "max_tokens": 3})
        assert open_requests[:3] == [4] * 3
        # One of them is refused: the others are forgotten, long before they could end.
        assert client.post("/v1/completions", json={"prompt": [[5], [61]], "max_tokens": 120}).status_code == 400
        deadline = time.monotonic() + 10
        while engine.has_work and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not engine.has_work and len(open_requests) < 100


def test_best_of_gives_the_most_probable(client):
    body = {"prompt": [5, 6], "max_tokens": 4, "seed": 3, "logprobs": 0}
    drawn = client.post("/v1/completions", json={**body, "n": 5}).json()["choices"]
    means = [sum(one["logprobs"]["token_logprobs"]) / 4 for one in drawn]
    best = client.post("/v1/completions", json={**body, "best_of": 5}).json()
    assert best["choices"][0]["text"] == drawn[means.index(max(means))]["text"]
    assert len(best["choices"]) == 1 and best["usage"]["completion_tokens"] == 20


def test_stop_text(client):
    free = greedy([5, 6, 7], 12)
    word = f"t{free.tokens[6]:02d}"
    body = {"prompt": [5, 6, 7], "max_tokens": 12, "temperature": 0, "stop": [word]}
    choice = client.post("/v1/completions", json=body).json()["choices"][0]
    assert choice["text"] == free.text[: free.text.index(word)] and choice["finish_reason"] == "stop"


def test_streams_are_the_whole_answer(client):
    body = {"prompt": [[5, 6], [7]], "max_tokens": 5, "n": 2, "seed": 1}
    whole = client.post("/v1/completions", json=body).json()
    streamed = {**body, "stream": True, "stream_options": {"include_usage": True}}
    with client.stream("POST", "/v1/completions", json=streamed) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        pieces = chunks(response)
    assert pieces[-1]["usage"] == whole["usage"] and pieces[-1]["choices"] == []
    for choice in whole["choices"]:
        mine = [p["choices"][0] for p in pieces[:-1] if p["choices"][0]["index"] == choice["index"]]
        assert "".join(one["text"] for one in mine) == choice["text"]
        assert [one["finish_reason"] for one in mine] == [None] * 4 + ["length"]


def test_chat(client):
    messages = [{"role": "user", "content": [{"type": "text", "text": "t05 t06"}]}]
    body = {"messages": messages, "max_completion_tokens": 5, "temperature": 0, "logprobs": True, "top_logprobs": 3}
    body["max_tokens"] = 3  # the older name, which does not count beside the newer
    answer = client.post("/v1/chat/completions", json=body).json()
    expected = greedy("t05 t06 t09", 5)
    choice = answer["choices"][0]
    assert answer["object"] == "chat.completion"
    assert choice["message"] == {"role": "assistant", "content": expected.text}
    content = choice["logprobs"]["content"]
    assert [entry["logprob"] for entry in content] == pytest.approx(expected.logprobs, abs=1e-5)
    assert [len(entry["top_logprobs"]) for entry in content] == [3] * 5
    assert bytes(content[0]["bytes"]).decode() == content[0]["token"]
    with client.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as response:
        pieces = [piece["choices"][0] for piece in chunks(response)]
    assert pieces[0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(piece["delta"]["content"] for piece in pieces) == expected.text


def test_without_a_bound_a_chat_may_fill_the_context(client):
    body = {"messages": [{"role": "user", "content": "t05"}], "temperature": 0}
    assert client.post("/v1/chat/completions", json=body).json()["usage"]["total_tokens"] == 132


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("completions", {"prompt": "t05", "model": "gpt"}, "model 'gpt' is not served here: the model is 'tiny'"),
        ("completions", {"prompt": ""}, "a prompt is empty"),
        ("completions", {"prompt": []}, "a prompt is empty"),
        ("completions", {"prompt": "\ud800"}, "half of a surrogate pair"),
        ("completions", {"prompt": [5, 61]}, "token 61 is outside the vocabulary"),
        ("completions", {"prompt": [[5], [-(2**70)]], "echo": True}, "is outside the vocabulary of 61"),
        ("completions", {"prompt": [[False]]}, "prompt: must be a text, a list of texts, a list of token ids or"),
        ("completions", {"prompt": [5], "max_tokens": 200}, "up to 200 new ones exceed"),
        ("completions", {"prompt": [5], "temperature": -1}, "temperature=-1"),
        ("completions", {"prompt": [5], "n": 3, "best_of": 2}, "best_of must not be smaller"),
        ("completions", {}, "prompt: is required"),
        ("completions", {"prompt": [5], "logit_bias": {"5": 101}}, "logit_bias of token 5 is 101.0, which is not betw"),
        ("completions", {"prompt": [5], "logit_bias": {"61": 1}}, "logit_bias: token 61 is outside the vocabulary"),
        ("completions", {"prompt": [5], "logit_bias": {"t05": 1}}, "logit_bias: must be an object of token ids and"),
        ("completions", {"prompt": [5], "suffix": "t06"}, "suffix: the engine has no such setting"),
        (
            "completions",
            {"prompt": [5], "prompt_logprobs": 1, "stream": True},
            "prompt_logprobs: they are not streamed",
        ),
        ("completions", {"prompt": [5], "stream_options": {"unknown": 1}}, "stream_options.unknown: is no field"),
        (
            "completions",
            {"prompt": [5], "max_tokens": 0},
            "max_tokens: 0 asks for nothing: give at least 1, or echo=true",
        ),
        ("completions", {"prompt": {"a": 1}}, "prompt: must be a text, a list of texts, a list of token ids or"),
        ("completions", {"prompt": [5], "stop": 5}, "stop: must be a text or a list of texts"),
        ("completions", {"prompt": [5], "frequency_penalty": 2.5}, "frequency_penalty=2.5 is not between -2 and 2"),
        ("completions", {"prompt": [5], "presence_penalty": -3}, "presence_penalty=-3.0 is not between -2 and 2"),
        ("completions", [], "the request: "),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "parts of type text",
        ),
        (
            "chat/completions",
            {"messages": [USER], "tools": [{}]},
            "tools: tools are not served here (vLLM",
        ),
        ("chat/completions", {"messages": [USER], "tool_choice": "auto"}, "tools are not served here"),
        (
            "chat/completions",
            {"messages": [USER], "response_format": {"type": "json_object"}},
            "response_format: structured output is not served here (vLLM serves it)",
        ),
        ("chat/completions", {"messages": []}, "messages"),
        ("chat/completions", {"messages": [USER], "chat_template_kwargs": {"think": 1}}, "'think' is no variable of"),
        ("chat/completions", {"messages": [USER], "chat_template_kwargs": {"messages": []}}, "'messages' is no varia"),
        (
            "chat/completions",
            {"messages": [USER], "max_tokens": 0},
            "max_tokens: Input should be greater than or equal to 1",
        ),
        ("chat/completions", {"messages": [USER], "top_logprobs": 2}, "top_logprobs needs logprobs"),
        ("chat/completions", {"messages": [{**USER, "tool_calls": [{}]}]}, "messages.0.tool_calls: is no field"),
        ("chat/completions", {"messages": [{"role": "user", "content": "\ud800"}]}, "half of a surrogate pair"),
        ("chat/completions", {"messages": [{"role": "tool", "content": "x"}]}, "no tools here"),
    ],
)
def test_bad_requests_get_openais_errors(client, path, body, message):
    response = client.post(f"/v1/{path}", content=json.dumps(body), headers=JSON)
    assert response.status_code == 400
    error = response.json()["error"]
    assert message in error["message"] and error["type"] == "invalid_request_error"
    for internal in ("[", "function-after", "Value error", "Extra inputs", "_unicode"):
        assert internal not in error["message"]
    assert client.get("/health").json()["open_requests"] == 0


@pytest.mark.parametrize(
    ("content", "status", "message"),
    [
        (b'{"prompt": "t05",}', 400, "the body is no JSON: "),
        (b'{"prompt": "\xff"}', 400, "error parsing the body"),
        (b"[" * 100_000, 400, "error parsing the body"),
        (b"", 400, "the request has no body: send JSON"),
        (None, 405, "Method Not Allowed"),
    ],
)
def test_what_is_no_request_gets_openais_errors(client, content, status, message):
    path = "/v1/completions"
    response = client.get(path) if content is None else client.post(path, content=content, headers=JSON)
    error = response.json()["error"]
    assert response.status_code == status and message in error["message"] and error["param"] is None


def test_null_is_absent_and_neutral_settings_are_taken(client):
    nothing = dict.fromkeys(("max_tokens", "n", "echo", "logit_bias", "suffix", "top_k", "stream_options"))
    body = {"prompt": [5, 6], "temperature": 0, "stream": True, "best_of": 1, **nothing}
    with client.stream("POST", "/v1/completions", json=body) as response:
        assert len(chunks(response)) == 16
    turn = {"role": "assistant", "content": "t06", "name": "photon", "refusal": None, "tool_calls": None}
    body = {"messages": [USER, turn], "max_tokens": 3, "logprobs": None, "tools": None}
    assert client.post("/v1/chat/completions", json=body).json()["usage"]["completion_tokens"] == 3


NEUTRAL = {
    "response_format": {"type": "text"},
    "tool_choice": "none",
    "tools": [],
    "logit_bias": {},
    "store": False,
    "metadata": {"a": "b"},
    "modalities": ["text"],
    "service_tier": "auto",
    "top_k": -1,
    "frequency_penalty": 0.0,
    "user": "me",
}


@pytest.mark.parametrize("name", sorted(NEUTRAL))
def test_what_asks_for_nothing_changes_nothing(client, name):
    body = {"messages": [USER], "max_tokens": 2, "seed": 4}
    expected = client.post("/v1/chat/completions", json=body).json()["choices"]
    answer = client.post("/v1/chat/completions", json={**body, name: NEUTRAL[name]})
    assert answer.status_code == 200 and answer.json()["choices"] == expected


def test_a_template_gets_its_variables(client):
    body = {"messages": [USER], "max_tokens": 3, "temperature": 0}
    answer = client.post("/v1/chat/completions", json={**body, "chat_template_kwargs": {"mood": "t07"}}).json()
    assert answer["choices"][0]["message"]["content"] == greedy("t07 t05 t09", 3).text
    assert answer["usage"]["prompt_tokens"] == 3


def test_penalties_and_biases_reach_the_engine(client):
    settings = {"frequency_penalty": 1.5, "presence_penalty": -0.5, "logit_bias": {9: 4.0, 11: 4.5}}
    body = {"prompt": [5, 6], "max_tokens": 12, "temperature": 0, **settings}
    found = client.post("/v1/completions", json=body).json()["choices"][0]["text"]
    assert found == greedy([5, 6], 12, **settings).text != greedy([5, 6], 12).text


def test_the_openapi_document_states_what_is_sent(client):
    paths = client.get("/openapi.json").json()["paths"]
    for path, methods in paths.items():
        for operation in methods.values():
            assert set(operation["responses"]) == {"200", "4XX", "5XX"}, path
    assert list(paths["/metrics"]["get"]["responses"]["200"]["content"]) == ["text/plain"]


def test_obfuscation_can_be_declined(client):
    body = {"prompt": [5], "max_tokens": 2, "stream": True, "stream_options": {"include_obfuscation": False}}
    with client.stream("POST", "/v1/completions", json=body) as response:
        assert len(chunks(response)) == 2


def test_one_model_can_be_asked_for(client):
    assert client.get("/v1/models/tiny").json() == client.get("/v1/models").json()["data"][0]
    response = client.get("/v1/models/org/other")
    assert response.status_code == 404 and response.json()["error"]["code"] == "model_not_found"


def test_a_tokenizer_without_a_template_cannot_chat():
    with TestClient(create_app(make_engine(None), "tiny")) as client:
        response = client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "t05"}]})
    assert response.status_code == 400 and "no chat template" in response.json()["error"]["message"]


def test_a_request_that_overflows_fails_alone():
    engine = make_engine()
    with torch.no_grad():
        engine.model.get_input_embeddings().weight[50] = torch.inf
    with TestClient(create_app(engine, "tiny"), raise_server_exceptions=False) as client:
        body = {"prompt": [[50] * 9, [5]], "max_tokens": 3, "n": 2}
        response = client.post("/v1/completions", json=body)
        assert response.status_code == 500 and "logits are not finite" in response.json()["error"]["message"]
        with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
            last = [json.loads(line.removeprefix("data: ")) for line in response.iter_lines() if line][-1]
        assert "logits are not finite" in last["error"]["message"]
        answer = client.post("/v1/completions", json={"prompt": [5, 6], "max_tokens": 3, "temperature": 0}).json()
        assert answer["choices"][0]["text"] == greedy([5, 6], 3).text
        assert client.get("/health").json() == {"status": "ok", "open_requests": 0}


def test_failures_have_openais_shape():
    engine = make_engine()
    decode = engine.runner.decode
    with TestClient(create_app(engine, "tiny", max_waiting=4)) as client:
        engine.runner.decode = lambda work: 1 / 0
        response = client.post("/v1/completions", json={"prompt": [5]})
        error = response.json()["error"]
        assert response.status_code == 500 and error["type"] == "server_error"
        assert "ZeroDivisionError: division by zero" in error["message"]
        engine.runner.decode = decode
        assert client.get("/health").json()["status"] == "ok"
        # More wait than may.
        worker = client.app.state.worker
        worker.max_waiting = 0
        response = client.post("/v1/completions", json={"prompt": [5]})
        assert response.status_code == 400
        worker.max_waiting, worker.failures = 1, 99
        engine.scheduler.waiting = [None]
        response = client.post("/v1/completions", json={"prompt": [5]})
        assert response.status_code == 429 and response.headers["retry-after"] == "1"
        assert response.json()["error"]["type"] == "rate_limit_error"
        assert client.get("/health").status_code == 503
    response = client.post("/v1/completions", json={"prompt": [5]})
    assert response.status_code == 503 and "does not take requests" in response.json()["error"]["message"]


@pytest.fixture
def address(app):
    """A real server, for what needs connections that break."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    app = create_app(make_engine(), "tiny")
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    yield f"http://127.0.0.1:{port}", app.state.worker
    server.should_exit = True
    thread.join()


def test_who_hangs_up_is_forgotten(address):
    url, worker = address
    step = worker.engine.step
    worker.engine.step = lambda: time.sleep(0.02) or step()
    body = {"prompt": [5, 6], "max_tokens": 120}
    with httpx.stream("POST", f"{url}/v1/completions", json={**body, "stream": True}) as response:
        next(response.iter_lines())
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{url}/v1/completions", json=body, timeout=0.3)
    deadline = time.monotonic() + 2  # 120 steps take longer
    while worker.engine.has_work and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not worker.engine.has_work and worker.num_open == 0
    # The next one is served.
    assert httpx.post(f"{url}/v1/completions", json={"prompt": [5], "max_tokens": 2}).status_code == 200


def test_the_recipe_serves_a_directory(tmp_path, monkeypatch):
    directory = tmp_path / "export"
    photon_model("memory").save_pretrained(directory)
    word_tokenizer().save_pretrained(directory)
    served = {}
    monkeypatch.setattr(uvicorn, "run", lambda app, **settings: served.update(settings, app=app))
    arguments = ["--model", str(directory), "--port", "1234", "--max-sequences", "2", "--memory", "1MiB"]
    monkeypatch.setattr(sys, "argv", ["serve.py", *arguments, "--device", "cpu"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(Path(__file__).resolve().parents[2] / "recipes" / "serve.py"), run_name="__main__")
    assert served["host"] == "127.0.0.1" and served["port"] == 1234
    with TestClient(served["app"]) as client:
        assert client.get("/v1/models").json()["data"][0]["id"] == "export"
        body = {"prompt": "t05", "max_tokens": 3, "temperature": 0, "ignore_eos": True}
        answer = client.post("/v1/completions", json=body).json()
    assert answer["usage"] == {"prompt_tokens": 1, "completion_tokens": 3, "total_tokens": 4}
