"""From what users have on disk to training: conversations, streams, mixtures, and the command that tokenises."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from tiny_chat import TEMPLATE, chat_file
from tiny_checkpoint import byte_tokenizer, tiny_checkpoint

from photon_train.config import load_config
from photon_train.data.tokenised import Corpus
from photon_train.errors import PhotonError
from photon_train.pipeline import run_conversion
from photon_train.pipeline.prepare import load_text
from photon_train.pipeline.stages import Stages

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def texts(tmp_path) -> tuple[Path, Path]:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for index in range(12):
            (tmp_path / name / f"{index}.txt").write_text(f"{name} {index} " * (10 + index))
    return tmp_path / "a", tmp_path / "b"


def settings(*arguments: object):
    base = ["--train.mixed_precision", "no", "--tracking.tracker", "none", "--train.dense_baseline", "false"]
    base += [
        "--train.seq_len",
        "64",
        "--train.max_steps",
        "2",
        "--train.batch_size",
        "2",
        "--export.sample_tokens",
        "4",
    ]
    return load_config([*base, *map(str, arguments)], prog="", description="")


def test_a_stream_gives_the_sequences_of_memory(texts, tmp_path):
    arguments = ["--data", texts[0], "--output", tmp_path / "out"]
    memory = load_text(settings(*arguments), byte_tokenizer(), 16, 1, False)
    stream = load_text(settings(*arguments, "--dataset.stream"), byte_tokenizer(), 16, 1, False)
    assert (tmp_path / "out" / "tokens" / "0" / "corpus.json").is_file()
    assert stream.summary() == memory.summary() and str(stream) == str(memory)
    assert "% of their positions filled" in str(memory)
    for one, other in ((stream.train, memory.train), (stream.held_out, memory.held_out)):
        rows = torch.arange(len(one))
        assert torch.equal(one.batch(rows)["labels"], other.batch(rows)["labels"])


@pytest.mark.parametrize("isolate", ["true", "false"])
def test_the_text_of_a_run_isolates_documents_and_holds_retrieval_if_asked(texts, tmp_path, isolate):
    arguments = ["--data", texts[0], "--output", tmp_path / "out", "--train.seq_len", 2048]
    arguments += ["--dataset.isolate_documents", isolate]
    plain = load_text(settings(*arguments), byte_tokenizer(), 1, 1, False)
    assert plain.retrieval is None and "retrieval" not in str(plain)
    text = load_text(settings(*arguments, "--dataset.retrieval_share", 0.25), byte_tokenizer(), 1, 1, False)
    assert str(text) == f"{plain}; 25% of the training is synthetic retrieval"
    keys = {"input_ids", "labels"} | ({"position_ids"} if isolate == "true" else set())
    for side in (text.train, text.held_out):
        rows = side.batch(torch.arange(len(side)))
        assert set(rows) == keys
        if isolate == "true":
            assert (rows["labels"][rows["position_ids"] == 0] == -100).all()
    made = text.retrieval.batch(torch.arange(6))
    assert set(made) == keys
    # Text that is held out is never used: a document there has a number of its own.
    written = [
        byte_tokenizer().decode(rows["input_ids"].flatten())
        for rows in (made, *(side.batch(torch.arange(len(side))) for side in (text.train, text.held_out)))
    ]
    used, trained, held_out = (set(re.findall(r"(?<=a )\d+(?= a )", each)) for each in written)
    assert held_out and not held_out & trained and used and used <= trained


def test_a_share_of_retrieval_needs_sequences_that_hold_a_question(texts, tmp_path):
    arguments = ["--data", texts[0], "--output", tmp_path / "out", "--dataset.retrieval_share", 0.1]
    with pytest.raises(PhotonError, match=r"dataset.retrieval_share: 64 tokens are too few .* set train.seq_len to"):
        load_text(settings(*arguments), byte_tokenizer(), 1, 1, False)


def test_a_mixture_of_text_and_of_what_the_command_tokenised(texts, tmp_path):
    checkpoint, corpus = tiny_checkpoint(tmp_path / "dense"), tmp_path / "corpus"
    command = [sys.executable, str(ROOT / "tools" / "pretokenize.py"), "--model", str(checkpoint)]
    command += ["--data", str(texts[1]), "--output", str(corpus)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))}
    for _ in range(2):  # again: nothing is left to do
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
        assert done.returncode == 0 and "12 documents" in done.stdout, done.stderr
    assert Corpus(corpus, byte_tokenizer()).lengths.sum() > 0
    sources = ["--dataset.sources.0.path", texts[0], "--dataset.sources.1.path", corpus]
    text = load_text(settings(*sources, "--dataset.sources.1.weight", 3), byte_tokenizer(), 16, 1, False)
    rows = text.train.batch(torch.arange(len(text.train)))["input_ids"]
    letters = byte_tokenizer().convert_tokens_to_ids(["a", "b"])
    counts = [int(sum((row == letter).any() for row in rows)) for letter in letters]
    assert counts[1] == pytest.approx(3 * counts[0], abs=2)


@pytest.mark.slow
def test_conversations_are_trained_on_and_the_template_is_exported(tmp_path):
    checkpoint = tiny_checkpoint(tmp_path / "dense")
    (tmp_path / "template.jinja").write_text(TEMPLATE)
    arguments = ["--model", checkpoint, "--data", chat_file(tmp_path / "chat.jsonl"), "--output", tmp_path / "out"]
    arguments += ["--dataset.messages_field", "messages", "--dataset.chat_template", tmp_path / "template.jinja"]
    config = settings(*arguments, "--dataset.stream", "--dataset.held_out_fraction", 0.2)
    run_conversion(config)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["tuned_ce"] < report["converted_ce"]
    from transformers import AutoTokenizer

    assert AutoTokenizer.from_pretrained(tmp_path / "out" / "export").chat_template == TEMPLATE


def test_text_that_the_processes_cannot_hold_is_refused_at_once(texts, tmp_path, monkeypatch):
    arguments = ["--data", texts[0], "--output", tmp_path / "out"]
    (texts[0] / "picture.png").write_bytes(bytes(10**6))  # is not read
    monkeypatch.setattr(os, "sysconf", lambda name: {"SC_PAGE_SIZE": 10, "SC_PHYS_PAGES": 1000}[name])
    load_text(settings(*arguments), byte_tokenizer(), 16, 1, False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    with pytest.raises(PhotonError, match="in 8 processes, this machine has .*dataset.stream"):
        load_text(settings(*arguments), byte_tokenizer(), 16, 8, False)
    load_text(settings(*arguments, "--dataset.stream"), byte_tokenizer(), 16, 8, False)


def test_tokens_are_written_when_every_process_has_looked_at_the_output(texts, tmp_path, monkeypatch):
    """NCCL joins processes at the first collective: a late one would find the directory that it expects to be empty."""
    dense, waited = tiny_checkpoint(tmp_path / "dense"), []

    class Begun(Exception):
        pass

    def begin(stages, config):
        raise Begun

    monkeypatch.setattr(Accelerator, "wait_for_everyone", lambda accelerator: waited.append(True))
    monkeypatch.setattr(Stages, "begin", begin)
    with pytest.raises(Begun):
        run_conversion(settings("--model", dense, "--data", texts[0], "--output", tmp_path / "out", "--dataset.stream"))
    assert waited and not (tmp_path / "out").exists()
