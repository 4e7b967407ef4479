"""The tools that break runs and the server: they see what has gone wrong."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"


def load(name: str) -> ModuleType:
    specification = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("said", "status", "is_right"),
    [
        ("Converting.\nerror: the disk is full\n", 2, True),
        ("error: the disk is full\n", 0, False),
        ("error: one\nerror: two\n", 2, False),
        ("Traceback (most recent call last):\nerror: the disk is full\n", 2, False),
        ("", 2, False),
    ],
)
def test_a_refusal_is_one_line(said, status, is_right, tmp_path):
    runs = load("break_runs").Runs(tmp_path, tmp_path)
    runs.judge(said, status, "a disk")
    assert (not runs.faults) == is_right


def test_an_export_must_be_the_same_and_nothing_half_written_left(tmp_path):
    tool = load("break_runs")
    runs = tool.Runs(tmp_path, tmp_path)
    (tmp_path / "export").mkdir()
    weights = tmp_path / "export" / "model.safetensors"
    weights.write_bytes(b"a")
    expected = tool.exported(tmp_path)
    runs.same(tmp_path, expected, "a kill")
    assert not runs.faults
    (tmp_path / ".export.123.partial").touch()
    runs.same(tmp_path, expected, "a kill")
    weights.write_bytes(b"b")
    runs.same(tmp_path, expected, "a kill")
    assert [fault.partition(": ")[2] for fault in runs.faults][::2] == ["left over: .export.123.partial"] * 2
    assert runs.faults[1] == "a kill: another export"


def test_the_inputs_are_a_model_that_knows_its_tokens(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    dense, text = load("break_runs").make_inputs(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(dense)
    assert tokenizer.decode(tokenizer("Line é").input_ids) == "Line é" and text.stat().st_size > 20_000
    assert AutoModelForCausalLM.from_pretrained(dense).config.vocab_size == len(tokenizer)


def test_clients_notice_other_answers_and_statuses():
    clients = load("break_server").Clients("http://127.0.0.1:1", 1.0)
    clients.expected["a"] = "b"
    clients.compare("b", "a", "fast")
    assert clients.judge(200, "fast") and not clients.judge(429, "fast") and not clients.faults
    clients.compare("c", "a", "fast")
    assert not clients.judge(500, "fast")
    assert clients.faults == {"fast: another text": 1, "fast: status 500": 1}
