"""Bad steps: skipped without a trace in the weights, counted, and too many end the run."""

from __future__ import annotations

import json
import math

import pytest
import torch
from tiny_training import Poison, tiny_data, tiny_model, tiny_run

from photon_train.config import RunConfig, TrainSettings
from photon_train.errors import PhotonError
from photon_train.training.accelerator import make_accelerator
from photon_train.training.guard import GuardState, SpikeGuard, _whole
from photon_train.training.loop import TrainResult, train
from photon_train.training.lora import add_lora

TRAIN, EVAL = tiny_data(14, seed=1), tiny_data(7, seed=2)


def step(guard: SpikeGuard, loss: float, norm: float, number: int = 1) -> str | None:
    guard.see_loss(loss)
    guard.see_norm(norm)
    return guard.close(number)


def steady(**settings) -> SpikeGuard:
    guard = SpikeGuard(TrainSettings(**{"spike_window": 8, **settings}), GuardState())
    for value in (2.0, 2.2, 1.8, 2.1, 1.9, 2.0):
        assert step(guard, value, value / 2) is None
    return guard


@pytest.mark.parametrize(
    ("loss", "norm", "reason"),
    [
        (math.nan, 1.0, "loss nan"),
        (math.inf, 1.0, "loss inf"),
        (2.0, math.nan, "gradient norm nan"),
        (9.0, 1.0, "loss 9 above 2."),
        (2.0, 4.0, "gradient norm 4 above 1."),
        (2.4, 1.2, None),
        (0.01, 0.001, None),
    ],
)
def test_what_is_skipped(loss, norm, reason):
    guard = steady()
    found = step(guard, loss, norm)
    assert (found is None) if reason is None else found.startswith(reason)
    assert (guard.state.skipped, guard.state.in_row) == ((0, 0) if reason is None else (1, 1))
    assert len(guard.state.losses) == 6 + (reason is None), "what was skipped is no measure for what follows"


def test_spikes_need_a_past_and_can_be_allowed():
    guard = SpikeGuard(TrainSettings(spike_window=8), GuardState())
    assert [step(guard, value, value) for value in (1.0, 1.0, 50.0)] == [None] * 3
    assert step(steady(spike_sigma=0.0), 1e6, 1e6) is None
    assert step(steady(spike_sigma=0.0), math.nan, 1.0) == "loss nan"


def test_the_ripples_of_a_very_steady_run_are_no_spikes():
    """A deviation counts as at least 5% of the mean."""
    guard = SpikeGuard(TrainSettings(spike_window=8, spike_sigma=4.0), GuardState())
    assert [step(guard, 2.0, 1.0) for _ in range(8)] == [None] * 8
    assert step(guard, 2.39, 1.19) is None
    guard = SpikeGuard(TrainSettings(spike_window=8, spike_sigma=4.0), GuardState(losses=[2.0] * 8, norms=[1.0] * 8))
    assert step(guard, 2.41, 1.0) and step(guard, 2.0, 1.21)


def test_deviations_are_those_of_the_steps_as_they_are():
    """Mean 2, deviation 1: not of a larger number of steps that these were drawn from."""
    for loss, skipped in ((5.9, False), (6.1, True)):
        guard = SpikeGuard(TrainSettings(spike_window=4, spike_sigma=4.0), GuardState(losses=[1.0, 3.0, 1.0, 3.0]))
        assert (step(guard, loss, 1.0) is not None) == skipped


def test_only_the_latest_steps_say_what_is_usual():
    guard = SpikeGuard(TrainSettings(spike_window=4), GuardState())
    for value in (9.0, 9.0, 9.0, 9.0, 5.0, 4.0, 3.0, 2.0):
        assert step(guard, value, value) is None
    assert guard.state.losses == guard.state.norms == [5.0, 4.0, 3.0, 2.0]


def test_under_fp16_an_infinite_gradient_is_left_to_the_scaler():
    guard = SpikeGuard(TrainSettings(), GuardState(), is_fp16=True)
    for norm in (math.inf, math.nan):
        assert step(guard, 1.0, norm) is None and guard.state.norms == []
    assert step(guard, math.nan, 1.0) == "loss nan"


def test_the_norm_of_several_groups_is_that_of_all_their_gradients():
    """Before DeepSpeed's loss scale is divided out; it writes -1 for one that is not finite."""
    assert _whole([3.0, 4.0], 2.0) == 2.5 and _whole([6.0], 1.0) == 6.0
    assert math.isnan(_whole([3.0, -1.0], 1.0))


def test_too_many_in_a_row_or_in_all_end_the_run():
    guard = steady(max_skipped_in_row=3)
    for loss in (math.nan, math.nan, 2.0, math.nan, math.nan):
        step(guard, loss, 1.0)
    with pytest.raises(PhotonError, match=r"diverged at step 12: 3 steps in a row .*max_skipped_in_row.* loss nan"):
        step(guard, math.nan, 1.0, 12)
    guard = steady(max_skipped_steps=2)
    step(guard, math.nan, 1.0)
    step(guard, 2.0, 1.0)
    with pytest.raises(PhotonError, match="2 steps were skipped .train.max_skipped_steps"):
        step(guard, math.nan, 1.0)


def run(config: RunConfig, output, steps: dict[int, str], on_step=None, **settings) -> TrainResult:
    model = add_lora(tiny_model("llama"), config.lora, config.seed)
    poison = Poison(model, steps)

    def after(number: int) -> None:
        poison(number)
        if on_step is not None:
            on_step(number, model)

    return train(model, TRAIN, EVAL, config, output, on_step=after, **settings)


@pytest.mark.parametrize("kind", ["nan", "gradient"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_bad_step_leaves_the_weights_alone(kind, accumulation, tmp_path):
    seen = {}

    def look(number: int, model) -> None:
        seen[number] = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    config = tiny_run(spike_window=4, max_steps=6, save_every=0, eval_every=0, log_every=6)
    config.train.batch_size, config.train.gradient_accumulation_steps = 4 // accumulation, accumulation
    result = run(config, tmp_path, {5: kind}, look)
    assert result.metrics["train/skipped_steps"] == 1
    assert all(value.equal(seen[5][name]) for name, value in seen[4].items())
    for one, other in ((3, 4), (5, 6)):
        assert any(not value.equal(seen[other][name]) for name, value in seen[one].items())
    assert all(value.isfinite().all() for value in seen[6].values())


def test_a_skipped_step_does_not_count_for_the_learning_rate(tmp_path):
    config = tiny_run(max_steps=6, save_every=0, eval_every=0, log_every=1)
    clean, poisoned = (
        [r["train/learning_rate"] for r in run(config, tmp_path / name, steps).history if "train/learning_rate" in r]
        for name, steps in (("clean", {}), ("poisoned", {4: "nan"}))
    )
    assert len(set(clean)) == 6 and poisoned == [*clean[:4], clean[3], clean[4]]


def test_the_loss_scaler_of_fp16_survives_a_skipped_step_between_micro_batches(tmp_path):
    """It accepts one update per step, after it has looked at the gradients."""
    config = tiny_run(batch_size=2, gradient_accumulation_steps=2)
    accelerator = make_accelerator(config, tmp_path)
    scaler = accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    accelerator.unscale_gradients = lambda: [scaler.unscale_(one.optimizer) for one in accelerator._optimizers]
    result = run(config, tmp_path, {3: "nan"}, accelerator=accelerator)
    assert result.steps == 6 and result.metrics["train/skipped_steps"] == 1 and scaler.get_scale() == 1.0


def test_a_run_that_diverges_stops_with_one_line_and_resumes_its_count(tmp_path):
    config = tiny_run(max_steps=12, max_skipped_in_row=3, save_every=1)
    with pytest.raises(PhotonError, match="diverged at step 6: 3 steps in a row") as caught:
        run(config, tmp_path, {4: "nan", 5: "nan", 6: "nan"})
    assert "\n" not in str(caught.value)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [r["train/skipped_steps"] for r in records if "train/skipped_steps" in r] == [1, 2]
    config.resume = True
    config.train.max_skipped_in_row = 4
    with pytest.raises(PhotonError, match="diverged at step 7: 4 steps in a row"):
        run(config, tmp_path, dict.fromkeys(range(1, 9), "nan"))
