"""Learning rates, new modules that learn alone first, and windows that shrink: by the step alone, through a resume."""

from __future__ import annotations

import pytest
import torch
from tiny_training import SEQ_LEN, losses, tiny_data, tiny_model, tiny_run

from photon_train.config import RunConfig, TrainSettings
from photon_train.errors import PhotonError
from photon_train.training.loop import TrainResult, train
from photon_train.training.lora import add_lora
from photon_train.training.schedule import (
    annealed_windows,
    learning_rate_factor,
    learning_rates,
    window_at,
    window_schedule,
)

TRAIN, EVAL = tiny_data(14, seed=1), tiny_data(7, seed=2)


def run(config: RunConfig, output, model: str = "memory-2-sinks", **kwargs) -> TrainResult:
    student = add_lora(tiny_model(model), config.lora, config.seed)
    return train(student, TRAIN, EVAL, config, output, **kwargs)


def test_rates_rise_linearly_and_fall_to_a_tenth():
    factors = [learning_rate_factor(step, 4, 100) for step in range(101)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert factors[52] == pytest.approx(0.55)
    assert factors[100] == pytest.approx(0.1)
    assert all(a > b for a, b in zip(factors[4:], factors[5:], strict=False))
    assert learning_rate_factor(0, 0, 10) == 1.0
    assert learning_rate_factor(107, 4, 100) == pytest.approx(0.1), "it does not rise again"


def test_new_modules_learn_alone_first(tmp_path):
    """For the steps asked for the adapters do not move by a bit, and the rest of the run warms them up."""
    config = tiny_run({"dropout": 0.1}, max_steps=6, warmup_steps=2, save_every=0, freeze_base_steps=3)
    student = add_lora(tiny_model("memory-2-sinks"), config.lora, config.seed)
    trained = {name: p for name, p in student.named_parameters() if p.requires_grad}
    adapters = {name for name in trained if "lora_" in name}
    assert adapters and adapters != trained.keys()
    before = {name: p.detach().clone() for name, p in trained.items()}
    moved: list[set[str]] = []

    def look(_: int) -> None:
        moved.append({name for name, p in trained.items() if not torch.equal(p, before[name])})

    result = train(student, TRAIN, EVAL, config, tmp_path, on_step=look)
    assert all(names and not names & adapters for names in moved[:3])
    assert moved[3] >= adapters
    rates = losses(result.history, "train/learning_rate")
    assert rates[:3] == [0, 0, 0] and rates[3:] == pytest.approx([1e-2 / 3, 2e-2 / 3, 1e-2])


def test_windows_halve_down_to_the_models_own():
    assert annealed_windows(64, 1024) == [512, 256, 128, 64]
    assert annealed_windows(7, 24) == [14, 7] and annealed_windows(12, 24) == [12]
    windows = annealed_windows(64, 1024)
    seen = [window_at(step, windows, 10) for step in range(12)]
    assert seen == [512] * 4 + [256] * 3 + [128] * 3 + [None] * 2
    assert window_at(0, [], 0) is None


def test_each_step_runs_with_its_window_and_evaluations_with_the_final_one(tmp_path):
    config = tiny_run(max_steps=4, eval_every=1, window_anneal_steps=2)
    seen: list[tuple[bool, int | None]] = []
    student = add_lora(tiny_model("memory-2-sinks"), config.lora, config.seed)
    student.get_base_model().register_forward_pre_hook(
        lambda module, _, inputs: seen.append((module.training, inputs.get("window"))), with_kwargs=True
    )
    result = train(student, TRAIN, EVAL, config, tmp_path)
    assert {window for training, window in seen if not training} == {None}
    assert [window for training, window in seen if training] == [14, 14, None, None]
    assert losses(result.history, "train/window") == [14, 14]


def test_a_narrower_window_is_no_spike(tmp_path, monkeypatch):
    """The guard forgets what was usual with the window before."""
    from photon_train.training.guard import SpikeGuard

    known: list[int] = []
    see_loss = SpikeGuard.see_loss

    def seen(self, loss):
        known.append(len(self.state.losses))
        see_loss(self, loss)

    monkeypatch.setattr(SpikeGuard, "see_loss", seen)
    run(tiny_run(max_steps=6, window_anneal_steps=3), tmp_path)
    assert known == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize("last", [2, 5])
def test_a_resumed_run_is_in_the_same_stage(last, tmp_path):
    """Killed while the adapters stand still and the window is wide, and after."""

    class Crash(Exception):
        pass

    def crash(step: int) -> None:
        if step == last:
            raise Crash

    config = tiny_run({"dropout": 0.2}, save_every=1, freeze_base_steps=3, window_anneal_steps=4)
    straight = run(config, tmp_path / "straight")
    with pytest.raises(Crash):
        run(config, tmp_path / "resumed", on_step=crash)
    config.resume = True
    resumed = run(config, tmp_path / "resumed")
    for key in ("train/loss", "train/grad_norm", "train/learning_rate", "train/window", "eval/ce"):
        assert losses(resumed.history, key) == losses(straight.history, key), key


@pytest.mark.parametrize(
    "model, settings, message",
    [
        ("llama", {"freeze_base_steps": 1}, "freeze_base_steps is set, but the model has no new modules"),
        ("memory-2-sinks", {"freeze_base_steps": 6}, "freeze_base_steps=6 leaves no step of train.max_steps=6"),
        ("llama", {"window_anneal_steps": 1}, "window_anneal_steps is set, but the model has no sliding window"),
        ("block-2", {"window_anneal_steps": 1}, "no sliding window .*photon.layout=stream"),
        ("memory-2-sinks", {"window_anneal_steps": 1, "seq_len": 14}, "twice the window of 7 is not shorter than"),
    ],
)
def test_stages_that_the_model_does_not_have_are_refused(model, settings, message):
    model = tiny_model(model)
    train_settings = TrainSettings(**{"max_steps": 6, "seq_len": SEQ_LEN, **settings})
    optimizer = torch.optim.AdamW([{"params": list(model.parameters()), "is_new": False}])
    with pytest.raises(PhotonError, match=message):
        learning_rates(optimizer, model, train_settings)
        window_schedule(model, train_settings)
