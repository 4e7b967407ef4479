"""What the loop does besides stepping: evaluation, clipping, clocks and seeds, each by itself on a few steps."""

from __future__ import annotations

import json
from itertools import count

import pytest
import torch
import torch.nn.functional as F
from tiny_training import losses, tiny_data, tiny_model, tiny_run

from photon_train.errors import PhotonError
from photon_train.training import loop
from photon_train.training.accelerator import make_accelerator
from photon_train.training.checkpoint import STATE_FILE, latest_checkpoint
from photon_train.training.heads import IGNORED
from photon_train.training.loop import evaluate, train
from photon_train.training.lora import add_lora
from photon_train.training.losses import TrainingObjective

TRAIN, EVAL = tiny_data(14, seed=1), tiny_data(7, seed=2)


def run(config, output, **settings):
    student = add_lora(tiny_model("llama"), config.lora, config.seed)
    return train(student, TRAIN, EVAL, config, output, **settings)


@pytest.mark.parametrize(("sequences", "batch_size"), [(5, 4), (7, 7), (99, 2)])
def test_an_evaluation_is_the_mean_over_the_targets_of_the_first_sequences(sequences, batch_size, tmp_path):
    """Whatever the last batch lacks of a whole one; without dropout, and the mode is left as it was."""
    config = tiny_run({"dropout": 0.5}, eval_sequences=sequences, batch_size=batch_size)
    model = add_lora(tiny_model("llama"), config.lora)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.3)
    batch = EVAL.batch(torch.arange(min(sequences, 7)))
    with torch.no_grad():
        logits = model.eval()(batch["input_ids"]).logits[:, :-1].flatten(0, 1)
    expected = F.cross_entropy(logits, batch["labels"][:, 1:].flatten(), ignore_index=IGNORED)
    objective = TrainingObjective(model)
    for mode in (True, False):
        objective.train(mode)
        found = evaluate(make_accelerator(config, tmp_path), objective, EVAL, config)
        assert found == pytest.approx(expected.item(), rel=1e-5)
        assert objective.training is mode and model.training is mode


def test_an_evaluation_needs_a_target(tmp_path):
    config = tiny_run()
    data = tiny_data(2)
    data.masked = torch.ones_like(data.tokens, dtype=torch.bool)
    with pytest.raises(PhotonError, match="no token of the held-out sequences is a target"):
        evaluate(make_accelerator(config, tmp_path), TrainingObjective(tiny_model("llama")), data, config)


def test_the_last_step_is_evaluated_and_saved_in_any_case(tmp_path):
    result = run(tiny_run(max_steps=2, eval_every=0, save_every=0, log_every=5), tmp_path)
    assert [r["step"] for r in result.history if "eval/ce" in r] == [0, 2]
    assert [r["step"] for r in result.history if "train/loss" in r] == [2]
    assert result.checkpoint == latest_checkpoint(result.checkpoint.parent) and result.checkpoint.name == "step_000002"


def test_the_rate_that_is_logged_is_the_steps_own(tmp_path):
    """Half of the way up, the peak, half of the way down."""
    config = tiny_run(max_steps=3, warmup_steps=1, log_every=1, eval_every=0, save_every=0)
    rates = losses(run(config, tmp_path).history, "train/learning_rate")
    assert rates == pytest.approx([config.train.learning_rate * factor for factor in (0.5, 1.0, 0.55)])


def test_the_tokens_of_all_micro_batches_count(tmp_path):
    config = tiny_run(max_steps=2, batch_size=1, gradient_accumulation_steps=3, eval_every=0, save_every=0)
    result = run(config, tmp_path)
    assert result.tokens == result.metrics["train/tokens"] == 2 * 3 * config.train.seq_len


@pytest.mark.parametrize("norm", [0.25, 1e6])
def test_gradients_are_clipped_to_the_norm_that_is_set(norm, tmp_path, monkeypatch):
    config, seen = tiny_run(max_steps=1, max_grad_norm=norm, save_every=0, eval_every=0), []
    accelerator = make_accelerator(config, tmp_path)
    clip = accelerator.clip_grad_norm_

    def recorded(parameters, max_norm):
        parameters = list(parameters)
        before = clip(parameters, max_norm)
        after = torch.stack([p.grad.norm() for p in parameters if p.grad is not None]).norm()
        seen.append((max_norm, float(before), float(after)))
        return before

    monkeypatch.setattr(accelerator, "clip_grad_norm_", recorded)
    result = run(config, tmp_path, accelerator=accelerator)
    ((max_norm, before, after),) = seen
    assert max_norm == norm and after == pytest.approx(min(norm, before), rel=1e-3)
    assert before > 0.25 and losses(result.history, "train/grad_norm") == [pytest.approx(before)]


def seconds_of(checkpoint) -> float:
    return json.loads((checkpoint / STATE_FILE).read_text())["seconds"]


def test_the_seconds_of_all_attempts_are_added_up(tmp_path, monkeypatch):
    """Every look at the clock is a second later."""
    ticks = count()
    monkeypatch.setattr(loop.time, "perf_counter", lambda: float(next(ticks)))
    config = tiny_run(max_steps=6, save_every=1, eval_every=0)

    def stop(step: int) -> None:
        if step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(config, tmp_path, on_step=stop)
    path = latest_checkpoint(tmp_path / "checkpoints" / "photon")
    first = seconds_of(path)
    config.resume = True
    result = run(config, tmp_path)
    assert first > 10 and first < seconds_of(result.checkpoint) <= result.seconds


def test_dropout_follows_the_seed_alone(tmp_path):
    seen = {}
    for name, seed, state in (("a", 0, 1), ("b", 0, 2), ("c", 3, 1)):
        config = tiny_run({"dropout": 0.5}, max_steps=2, save_every=0, eval_every=0)
        config.seed = seed
        torch.manual_seed(state)
        seen[name] = losses(run(config, tmp_path / name).history)
    assert seen["a"] == seen["b"] != seen["c"]
