"""Learning rates: a function of the step alone."""

from __future__ import annotations

import pytest
import torch

from photon_train.config import TrainSettings
from photon_train.training.schedule import learning_rate_factor, learning_rates


def test_rates_rise_linearly_and_fall_to_a_tenth():
    factors = [learning_rate_factor(step, 4, 100) for step in range(101)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert factors[52] == pytest.approx(0.55)
    assert factors[100] == pytest.approx(0.1)
    assert all(a > b for a, b in zip(factors[4:], factors[5:], strict=False))
    assert learning_rate_factor(0, 0, 10) == 1.0
    assert learning_rate_factor(107, 4, 100) == pytest.approx(0.1), "it does not rise again"


def test_every_group_follows_the_schedule_from_its_own_peak():
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": peak} for peak in (1.0, 0.1)]
    optimizer = torch.optim.AdamW(groups)
    scheduler = learning_rates(optimizer, TrainSettings(max_steps=6, warmup_steps=2))
    seen = []
    for _ in range(6):
        seen.append(scheduler.get_last_lr())
        optimizer.step()
        scheduler.step()
    expected = [learning_rate_factor(step, 2, 6) for step in range(6)]
    assert [rates[0] for rates in seen] == pytest.approx(expected)
    assert [rates[1] for rates in seen] == pytest.approx([factor / 10 for factor in expected])
