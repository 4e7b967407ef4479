"""The evaluation harness on dense and PHOTON checkpoints, with a task that lies beside the test."""

from __future__ import annotations

import importlib.util
import json
import sys
from functools import partial
from pathlib import Path

import lm_eval.tasks
import pytest
import torch
from tiny_checkpoint import tiny_checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer

from photon_train.config import load_config
from photon_train.conversion.apply import convert
from photon_train.conversion.presets import make_plan, photon_config
from photon_train.conversion.source import DenseCheckpoint
from photon_train.errors import PhotonError
from photon_train.evaluation.harness import open_tasks

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "evaluate.py"
QUESTIONS = [
    {"question": f"What comes after {word}?", "choices": ["one", "two", "three, or more"], "answer": index % 3}
    for index, word in enumerate(["zero", "one", "a", "line 7", "def f(x):", "the end", "2"])
]


@pytest.fixture(scope="module")
def task(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("tasks")
    (directory / "questions.jsonl").write_text("\n".join(json.dumps(question) for question in QUESTIONS))
    settings = {
        "task": "after",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(directory / "questions.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        "metadata": {"version": 1.0},
    }
    (directory / "after.yaml").write_text(json.dumps(settings))  # JSON is YAML
    return directory


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[Path, Path]:
    """A dense checkpoint, and its graft with a window that holds every question: the same function."""
    directory = tmp_path_factory.mktemp("models")
    dense = tiny_checkpoint(directory / "dense")
    config = load_config(["--photon.window", "64"], prog="", description="")
    checkpoint = DenseCheckpoint.open(str(dense))
    target = photon_config(checkpoint.config, config)
    convert(checkpoint, make_plan(checkpoint, target), target, directory / "photon", progress=False)
    AutoTokenizer.from_pretrained(dense).save_pretrained(directory / "photon")
    return dense, directory / "photon"


@torch.no_grad()
def _accuracy(model, tokenizer) -> float:
    """Share of the questions whose answer has the highest log-probability, computed one by one."""
    right = 0
    for question in QUESTIONS:
        scores = []
        for choice in question["choices"]:
            context, answer = (tokenizer(text)["input_ids"] for text in (question["question"], f" {choice}"))
            logits = model(torch.tensor([context + answer])).logits[0, len(context) - 1 : -1]
            scores.append(float(logits.log_softmax(-1)[torch.arange(len(answer)), answer].sum()))
        right += scores.index(max(scores)) == question["answer"]
    return right / len(QUESTIONS)


@pytest.mark.slow
def test_the_recipe_scores_models_side_by_side(models, task, tmp_path, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("evaluate_recipe", RECIPE)
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    output = tmp_path / "scores.json"
    arguments = ["--model", *map(str, models), "--tasks", "after", "--include-path", str(task), "--batch-size", "4"]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *arguments, "--output", str(output), "--device", "cpu"])
    recipe.main()
    dense, photon = json.loads(output.read_text())["rows"]
    model = AutoModelForCausalLM.from_pretrained(models[0])
    expected = _accuracy(model, AutoTokenizer.from_pretrained(models[0]))
    assert dense["acc,none"] == photon["acc,none"] == pytest.approx(expected) and 0 < expected < 1
    assert dense["acc_norm,none"] == photon["acc_norm,none"]
    assert "acc_norm" in capsys.readouterr().out


def test_an_unknown_task_is_named_before_a_model_is_loaded(task, monkeypatch):
    own = partial(lm_eval.tasks.TaskManager, include_defaults=False)  # thousands of files would be read
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", own)
    assert open_tasks(["after"], task).match_tasks(["after"])
    with pytest.raises(PhotonError, match="no task absent"):
        open_tasks(["after", "absent"], task)
