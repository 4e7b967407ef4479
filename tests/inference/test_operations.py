"""What those who run a server need of it: metrics, and a key that clients must send."""

from __future__ import annotations

import re

import pytest
from tiny import photon_model
from tiny_tokenizer import word_tokenizer

from photon_train.errors import PhotonError
from photon_train.inference.engine import Engine, EngineSettings
from photon_train.inference.metrics import Histogram

TestClient = pytest.importorskip("fastapi.testclient").TestClient
create_app = pytest.importorskip("photon_train.inference.server").create_app


def make_engine() -> Engine:
    model = photon_model("memory")
    model.generation_config.eos_token_id = None
    return Engine(model, word_tokenizer(), EngineSettings(max_length=64, max_sequences=4, max_prefixes=2))


def test_metrics_count_what_was_done():
    engine = make_engine()
    with TestClient(create_app(engine, "tiny")) as client:
        for _ in range(2):
            client.post("/v1/completions", json={"prompt": [5, 6, 7], "max_tokens": 4, "n": 2})
        client.post("/v1/completions", json={"prompt": [61]})  # no such token
        client.post("/v1/completions", json={"prompt": [5], "tools": [{}]})  # not done here
        client.post("/v1/completions", json={"prompt": [5], "max_tokens": "many"})  # not a number
        decode, engine.runner.decode = engine.runner.decode, lambda work: 1 / 0
        client.post("/v1/completions", json={"prompt": [8], "max_tokens": 4})
        engine.runner.decode = decode
        response = client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = [line for line in response.text.splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z_]+(\{[a-z]+=\"[^\"]+\"\})? [0-9.e+-]+", line) for line in lines)
    values = {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}
    outcomes = ("answered", "failed", "refused", "dropped")
    assert [values[f'photon_requests_total{{outcome="{name}"}}'] for name in outcomes] == [2, 1, 3, 0]
    assert values["photon_prompt_tokens_total"] == 3 + 3 + 1
    assert values["photon_generated_tokens_total"] == 2 * 2 * 4 + 1
    assert values["photon_prefix_hit_tokens_total"] == 3 * 3  # all but the first continuation
    assert values["photon_requests_open"] == values["photon_sequences_waiting"] == 0
    assert values["photon_cache_blocks_used"] <= values["photon_cache_blocks"]
    for name, count in (("photon_first_token_seconds", 3), ("photon_request_seconds", 2)):
        assert values[f"{name}_count"] == values[f'{name}_bucket{{le="+Inf"}}'] == count and values[f"{name}_sum"] > 0
        buckets = [value for key, value in values.items() if key.startswith(f"{name}_bucket")]
        assert buckets == sorted(buckets)


def test_a_bucket_counts_what_took_no_longer_than_its_bound():
    histogram = Histogram()
    for seconds in (0.01, 0.02, 300.0, 301.0):
        histogram.observe(seconds)
    counts = dict(line.rsplit(" ", 1) for line in histogram.lines("a"))
    found = [counts[f'a_bucket{{le="{bound}"}}'] for bound in (0.01, 0.025, 120.0, 300.0, "+Inf")]
    assert found == ["1", "2", "2", "3", "4"]
    assert counts["a_count"] == "4" and float(counts["a_sum"]) == pytest.approx(601.03)


@pytest.mark.parametrize(
    ("header", "status"),
    [(None, 401), ("Bearer other", 401), ("Basic key", 401), ("Bearer kéy", 401), ("Bearer key", 200)],
)
def test_a_key_is_asked_for(header, status):
    client = TestClient(create_app(make_engine(), "tiny", api_key="key"))
    headers = {} if header is None else {"authorization": header.encode("latin-1")}
    with client:
        for response in (
            client.get("/v1/models", headers=headers),
            client.get("/v1/models/tiny", headers=headers),
            client.post("/v1/completions", json={"prompt": [5], "max_tokens": 1}, headers=headers),
        ):
            assert response.status_code == status
            if status == 401:
                assert "the API key is missing or wrong" in response.json()["error"]["message"]
                assert response.headers["www-authenticate"] == "Bearer"
        assert client.post("/v1/chat/completions", json={}, headers=headers).status_code == (
            401 if status == 401 else 400
        )
        assert client.get("/health").status_code == client.get("/metrics").status_code == 200


def test_an_empty_key_is_refused():
    with pytest.raises(PhotonError, match="--api-key is empty"):
        create_app(make_engine(), "tiny", api_key=" ")
