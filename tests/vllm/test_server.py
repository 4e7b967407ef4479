"""``vllm serve`` on a real model: SmolLM2 as `make test-vllm` converts it, asked through OpenAI's client."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
import torch
from transformers import AutoTokenizer

from photon_train.models import PhotonForCausalLM

EXPORT = Path(os.environ.get("PHOTON_EXPORT", ".venv-vllm/smollm2/export")).resolve()
STREAMS = 16
SENTENCE = "The keeper of the harbour wrote the weather of that day into a book, as he had done for years. "

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of a server, in fp32 with steps of 512 tokens."""
    if not (EXPORT / "config.json").is_file():
        pytest.fail(f"no export in {EXPORT}: run `make test-vllm`, which makes it")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    command = [Path(sys.executable).with_name("vllm"), "serve", str(EXPORT), "--port", str(port)]
    command += ["--served-model-name", "photon", "--dtype", "float32", "--enforce-eager", "--max-model-len", "8192"]
    command += ["--max-num-batched-tokens", "512", "--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "2", "OMP_NUM_THREADS": "2"}
    environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    with log.open("w") as out:
        server = subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT)
    try:
        for _ in range(240):
            time.sleep(1)
            assert server.poll() is None, log.read_text()[-3000:]
            try:
                if httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                    break
            except httpx.ConnectError:
                continue
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(60)


@pytest.fixture(scope="module")
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=600)


@pytest.fixture(scope="module")
def model() -> PhotonForCausalLM:
    return PhotonForCausalLM.from_pretrained(EXPORT, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(EXPORT)


def test_a_question_about_four_thousand_tokens_is_answered_as_by_transformers(client, model, tokenizer) -> None:
    text = SENTENCE * 95 + "The number of the green door is 73914. " + SENTENCE * 95
    question = [{"role": "user", "content": text + "What is the number of the green door?"}]
    ids = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    length = ids["input_ids"].shape[1]
    assert length > 4000
    out = model.generate(**ids, max_new_tokens=12, do_sample=False)
    answer = client.chat.completions.create(model="photon", messages=question, max_tokens=12, temperature=0)
    assert answer.usage.prompt_tokens == length
    assert answer.choices[0].message.content == tokenizer.decode(out[0, length:], skip_special_tokens=True)


def test_streams_side_by_side_give_what_each_gives_alone(url: str, client) -> None:
    asked = [f"{SENTENCE * (index % 4)}Count from {index} to ten:" for index in range(STREAMS)]
    settings = {"model": "photon", "max_tokens": 16, "temperature": 0}
    alone = [client.completions.create(prompt=prompt, **settings).choices[0].text for prompt in asked[::5]]

    async def read(asynchronous: openai.AsyncOpenAI, prompt: str) -> str:
        stream = await asynchronous.completions.create(prompt=prompt, stream=True, **settings)
        return "".join([piece.choices[0].text async for piece in stream])

    async def all_streams() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", timeout=600) as asynchronous:
            return await asyncio.gather(*(read(asynchronous, prompt) for prompt in asked))

    assert asyncio.run(all_streams())[::5] == alone


def test_json_by_a_schema(client) -> None:
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 20}, "age": {"type": "integer", "maximum": 120}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        model="photon",
        messages=[{"role": "user", "content": "Describe a person as JSON."}],
        max_tokens=80,
        temperature=0,
        response_format={"type": "json_schema", "json_schema": {"name": "person", "schema": schema}},
    )
    person = json.loads(answer.choices[0].message.content)
    assert set(person) == {"name", "age"} and isinstance(person["age"], int)


def test_a_tool_call(client) -> None:
    parameters = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 20}}, "required": ["city"]}
    answer = client.chat.completions.create(
        model="photon",
        messages=[{"role": "user", "content": "What is the weather in Paris?"}],
        max_tokens=80,
        temperature=0,
        tools=[{"type": "function", "function": {"name": "weather", "parameters": parameters}}],
        tool_choice="required",
    )
    call = answer.choices[0].message.tool_calls[0]
    assert call.function.name == "weather" and "Paris" in json.loads(call.function.arguments)


def test_lm_evaluation_harness_scores_through_the_server(url: str, tmp_path: Path) -> None:
    """`local-completions` gives the log-likelihoods that `hf` gives on the export itself."""
    documents = tmp_path / "documents.jsonl"
    texts = [SENTENCE, "Seven times eight is", SENTENCE * 30 + "And then"]
    documents.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    script = tmp_path / "score.py"
    script.write_text(SCORE)
    done = subprocess.run(
        [sys.executable, str(script), str(documents), str(EXPORT), url],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    theirs, ours = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("[[")))
    assert len(theirs) == 6 and theirs == pytest.approx(ours, abs=1e-3)


SCORE = """
import json, sys
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM
import photon_train.models
documents, export, url = sys.argv[1:]
task = {
    "task": "choice",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": documents}},
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{text}}",
    "doc_to_choice": "{{[' fifty-six', ' nobody came']}}",
    "doc_to_target": "0",
    "target_delimiter": "",
    "metric_list": [{"metric": "acc"}],
    "metadata": {"version": 1.0},
}
found = []
model = AutoModelForCausalLM.from_pretrained(export, dtype="float32")
for lm, arguments in (
    ("local-completions", {"model": "photon", "base_url": url + "/v1/completions", "tokenizer": export}),
    (HFLM(pretrained=model, tokenizer=export, batch_size=2), None),
):
    out = simple_evaluate(model=lm, model_args=arguments, tasks=[task], task_manager=TaskManager(), log_samples=True)
    samples = sorted(out["samples"]["choice"], key=lambda sample: sample["doc_id"])
    found.append([response[0] for sample in samples for response in sample["filtered_resps"]])
print(json.dumps(found))
"""
