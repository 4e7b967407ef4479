"""The learning rates over a run: a function of the steps that were not skipped.

Checkpoints hold their count, so that a resumed run goes on with the same values.
"""

from __future__ import annotations

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from photon_train.config import TrainSettings

FINAL_LEARNING_RATE = 0.1


def learning_rate_factor(step: int, warmup_steps: int, max_steps: int) -> float:
    """Factor on the peak learning rate for optimiser step `step` (from 0): linear up, then a cosine to 10%."""
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    progress = min(1.0, (step - warmup_steps) / max(1, max_steps - warmup_steps))
    return FINAL_LEARNING_RATE + (1 - FINAL_LEARNING_RATE) * 0.5 * (1 + math.cos(math.pi * progress))


def learning_rates(optimizer: Optimizer, settings: TrainSettings) -> LambdaLR:
    """The schedule of all parameter groups."""
    return LambdaLR(optimizer, lambda step: learning_rate_factor(step, settings.warmup_steps, settings.max_steps))
