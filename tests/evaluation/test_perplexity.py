"""Held-out loss: against its definition, and against the training's evaluation."""

from __future__ import annotations

import math

import pytest
import torch
from accelerate import Accelerator
from tiny_training import tiny_data, tiny_model, tiny_run

from photon_train.errors import PhotonError
from photon_train.evaluation.perplexity import EvalResult, evaluate_loss, perplexity
from photon_train.training.loop import evaluate
from photon_train.training.losses import TrainingObjective


@torch.no_grad()
def expected_loss(model, data, count: int, **options) -> tuple[float, int]:
    """Token by token in float64."""
    total, tokens = 0.0, 0
    for index in range(count):
        item = data[index]
        scores = model(item["input_ids"][None], **options).logits[0].double().log_softmax(-1)
        for position in range(len(item["labels"]) - 1):
            if (label := item["labels"][position + 1].item()) != -100:
                total, tokens = total - scores[position, label].item(), tokens + 1
    return total / tokens, tokens


@pytest.mark.parametrize("name", ["llama", "memory", "block-2"])
@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_mean_over_the_labelled_tokens(name: str, batch_size: int) -> None:
    model, data = tiny_model(name).eval(), tiny_data(7)
    result = evaluate_loss(model, data, batch_size)
    ce, tokens = expected_loss(model, data, 7)
    assert result.ce == pytest.approx(ce, abs=1e-5) and result.tokens == tokens
    assert result.perplexity == pytest.approx(math.exp(ce), rel=1e-4)


@pytest.mark.parametrize("name", ["llama", "memory"])
def test_equals_the_training_s_evaluation(name: str) -> None:
    model, data, run = tiny_model(name), tiny_data(7), tiny_run()
    ours = evaluate_loss(model, data, 4, max_sequences=run.train.eval_sequences)
    assert evaluate(Accelerator(cpu=True), TrainingObjective(model), data, run) == pytest.approx(ours.ce, abs=1e-5)


def test_dense_function_of_a_graft() -> None:
    model, data = tiny_model("memory").eval(), tiny_data(3)
    result = evaluate_loss(model, data, 2, as_dense=True)
    assert result.ce == pytest.approx(expected_loss(model, data, 3, as_dense=True)[0], abs=1e-5)
    assert abs(result.ce - evaluate_loss(model, data, 2).ce) > 1e-3


@pytest.mark.parametrize(
    ("name", "as_dense"), [("llama", False), ("memory", False), ("memory", True), ("block-2", False)]
)
def test_isolated_documents_have_the_loss_that_they_have_alone(name: str, as_dense: bool) -> None:
    """The dense baseline, PHOTON and the dense function that it holds alike; no token is predicted across a start."""
    model, data = tiny_model(name).eval(), tiny_data(6, documents=True)
    data.filler = data.masked = None
    options, total, tokens = {"as_dense": True} if as_dense else {}, 0.0, 0
    for row, starts in zip(data.tokens.long(), data.starts, strict=True):
        edges = [0, *(starts[1:].nonzero()[:, 0] + 1).tolist(), len(row)]
        for begin, end in zip(edges, edges[1:], strict=False):
            document = row[None, begin:end]
            if document.shape[1] > 1:
                with torch.no_grad():
                    loss = model(document, labels=document, use_cache=False, **options).loss
                total, tokens = total + loss.item() * (end - begin - 1), tokens + end - begin - 1
    found = evaluate_loss(model, data, 4, as_dense=as_dense)
    assert found.tokens == tokens < data.tokens.numel() - len(data)
    assert found.ce == pytest.approx(total / tokens, abs=1e-5)
    data.starts = None
    assert abs(evaluate_loss(model, data, 4, as_dense=as_dense).ce - found.ce) > 1e-3


def test_mode_precision_and_sequences_without_targets() -> None:
    model, data = tiny_model("llama").train(), tiny_data(5)
    data.filler[1] = True
    full = evaluate_loss(model, data, 1)
    assert model.training
    half = evaluate_loss(model, data, 1, mixed_precision="bf16")
    assert 0 < abs(half.ce - full.ce) < 0.05 and half.tokens == full.tokens
    data.filler[:] = True
    with pytest.raises(PhotonError, match="no token"):
        evaluate_loss(model, data, 1)


def test_perplexity_does_not_overflow() -> None:
    assert math.isfinite(perplexity(1e6)) and EvalResult(0.0, 1).perplexity == 1.0
