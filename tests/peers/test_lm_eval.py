"""lm-evaluation-harness on an export equals one text at a time, without a cache.

It computes in padded batches under transformers, or asks the server (`local-completions`).
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import uvicorn
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.models.openai_completions import LocalCompletionsAPI
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer

from photon_train.inference.engine import Engine, EngineSettings
from photon_train.inference.server import create_app
from photon_train.inference.text import load_for_inference

# One process makes the export, for all who use it.
pytestmark = pytest.mark.xdist_group("export")

# Longer than the export's window; texts of several lengths, so that batches have padding.
SENTENCES = [
    "The harbour was quiet, and nobody on the quay knew whose boat had come in during the night.",
    "It rained.",
    "Seven times eight is fifty-six, eight times seven is fifty-six too, and that is all there is to say about it.",
    "A short walk, then tea; then another walk, longer than the first, until the lamps were lit along the river." * 3,
    "def f(x): return x + 1",
]
ENDINGS = [" It was late.", " They left again without a word, as they had come.", " Yes"]
MAX_LENGTH = 128  # shorter than the longest sentence, which is read in several windows
STOP = "e"


def _tasks(directory: Path) -> list[dict[str, Any]]:
    """Tasks over local files, one for each kind of request."""
    path = directory / "documents.jsonl"
    documents = [{"text": text, "endings": ENDINGS, "answer": index % 3} for index, text in enumerate(SENTENCES)]
    path.write_text("\n".join(map(json.dumps, documents)))
    shared = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path)}},
        "test_split": "test",
        "metadata": {"version": 1.0},
    }
    choice = {
        "doc_to_text": "{{text}}",
        "doc_to_choice": "{{endings}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "",
    }
    rolling = {"doc_to_text": "", "doc_to_target": "{{text}}"}
    generation = {"doc_to_text": "{{text[:90]}}", "doc_to_target": "x"}
    return [
        shared | choice | {"task": "choice", "output_type": "multiple_choice", "metric_list": [{"metric": "acc"}]},
        shared
        | rolling
        | {"task": "rolling", "output_type": "loglikelihood_rolling", "metric_list": [{"metric": "bits_per_byte"}]},
        shared
        | generation
        | {
            "task": "generation",
            "output_type": "generate_until",
            "metric_list": [{"metric": "exact_match"}],
            "generation_kwargs": {"until": [STOP], "max_gen_toks": 24, "do_sample": False},
        },
    ]


@contextmanager
def _transformers(export: Path) -> Iterator[HFLM]:
    yield HFLM(
        pretrained=str(export),
        trust_remote_code=True,
        dtype="float32",
        device="cpu",
        batch_size=3,
        max_length=MAX_LENGTH,
    )


@contextmanager
def _server(export: Path) -> Iterator[LocalCompletionsAPI]:
    """A running one; prompts are fed in segments shorter than most of them."""
    model, tokenizer = load_for_inference(export, "torch", "cpu", "float32")
    engine = Engine(model, tokenizer, EngineSettings(max_sequences=4, max_length=256, segment_tokens=48))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(create_app(engine, "export"), port=port, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.02)
        yield LocalCompletionsAPI(
            model="export",
            base_url=f"http://127.0.0.1:{port}/v1/completions",
            tokenizer=str(export),
            tokenizer_backend="huggingface",
            trust_remote_code=True,
            batch_size=3,
            num_concurrent=2,
            max_length=MAX_LENGTH + 2,  # the harness takes a token for the answer, and one that has no successor
        )
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module", params=[_transformers, _server], ids=["transformers", "server"])
def results(request: pytest.FixtureRequest, export: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the harness reports, with every request and its answer."""
    manager = TaskManager(include_defaults=False)
    tasks = _tasks(tmp_path_factory.mktemp("tasks"))
    with request.param(export) as model:
        return simple_evaluate(model, tasks=tasks, task_manager=manager, log_samples=True, bootstrap_iters=0)


@pytest.fixture(scope="module")
def direct(export: Path) -> Direct:
    return Direct(export)


class Direct:
    """The same quantities from whole passes over single texts, without padding and cache."""

    def __init__(self, export: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(export, trust_remote_code=True, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(export, trust_remote_code=True)

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    @torch.no_grad()
    def log_probabilities(self, ids: list[int]) -> torch.Tensor:
        """Of each next token, ``[T, vocabulary]``."""
        return self.model(torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)

    def score(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        """Log-probability of `continuation` after `context`, and whether it is what greedy decoding gives."""
        found = self.log_probabilities((context + continuation)[:-1])[-len(continuation) :]
        expected = torch.tensor(continuation)
        return float(found[range(len(continuation)), expected].sum()), bool((found.argmax(-1) == expected).all())

    def rolling(self, text: str) -> float:
        """Log-probability of a text: each token once, after at most `MAX_LENGTH` tokens."""
        ids, total = [self.tokenizer.eos_token_id, *self.ids(text)], 0.0
        for first in range(1, len(ids), MAX_LENGTH):
            last = min(first + MAX_LENGTH, len(ids))
            total += self.score(ids[max(0, last - MAX_LENGTH - 1) : first], ids[first:last])[0]
        return total

    def generate(self, prompt: str, count: int) -> str:
        """Greedy text up to `STOP`, at most `count` tokens; the context is cut as the harness cuts it."""
        ids = self.ids(prompt)[-(MAX_LENGTH - count) :]
        new: list[int] = []
        while len(new) < count and STOP not in self.tokenizer.decode(new):
            new.append(int(self.log_probabilities(ids + new)[-1].argmax()))
            if new[-1] == self.tokenizer.eos_token_id:
                break
        return self.tokenizer.decode(new, skip_special_tokens=True).split(STOP)[0]


def test_log_likelihoods(results: dict[str, Any], direct: Direct) -> None:
    right = []
    for sample in results["samples"]["choice"]:
        scores = []
        for ending, (found, greedy) in zip(ENDINGS, sample["filtered_resps"], strict=True):
            context = direct.ids(sample["doc"]["text"])
            continuation = direct.ids(ending)
            context = context[-(MAX_LENGTH + 1 - len(continuation)) :]
            expected = direct.score(context, continuation)
            assert found == pytest.approx(expected[0], abs=1e-3) and greedy == expected[1]
            scores.append(expected[0])
        right.append(scores.index(max(scores)) == sample["doc"]["answer"])
    assert results["results"]["choice"]["acc,none"] == pytest.approx(sum(right) / len(right))


def test_rolling_log_likelihoods(results: dict[str, Any], direct: Direct) -> None:
    total = bytes_ = 0.0
    for sample in results["samples"]["rolling"]:
        expected = direct.rolling(sample["doc"]["text"])
        assert sample["filtered_resps"][0] == pytest.approx(expected, abs=1e-3)
        total, bytes_ = total + expected, bytes_ + len(sample["doc"]["text"].encode())
    bits = -total / bytes_ / torch.log(torch.tensor(2.0)).item()
    assert results["results"]["rolling"]["bits_per_byte,none"] == pytest.approx(bits, abs=1e-4)


def test_generated_text(results: dict[str, Any], direct: Direct) -> None:
    found = [sample["resps"][0][0] for sample in results["samples"]["generation"]]
    expected = [direct.generate(sample["doc"]["text"][:90], 24) for sample in results["samples"]["generation"]]
    assert found == expected
    assert len(set(found)) > 1 and any(found)
