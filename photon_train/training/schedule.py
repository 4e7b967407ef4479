"""What changes over a run: learning rates, and the window where it is annealed. Functions of the step alone.

A resumed run therefore goes on with the same values, whatever was skipped or repeated.
"""

from __future__ import annotations

import math

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from photon_train.config import TrainSettings
from photon_train.errors import PhotonError
from photon_train.training.lora import base_model, new_module_names

FINAL_LEARNING_RATE = 0.1


def learning_rate_factor(step: int, warmup_steps: int, max_steps: int) -> float:
    """Factor on the peak learning rate for optimiser step `step` (from 0): linear up, then a cosine to 10%."""
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    progress = min(1.0, (step - warmup_steps) / max(1, max_steps - warmup_steps))
    return FINAL_LEARNING_RATE + (1 - FINAL_LEARNING_RATE) * 0.5 * (1 + math.cos(math.pi * progress))


def learning_rates(optimizer: Optimizer, model: nn.Module, settings: TrainSettings) -> LambdaLR:
    """The schedule of the groups that `lora.parameter_groups` made.

    With `train.freeze_base_steps` everything but the new modules stands still for so many steps (at a rate of 0 AdamW
    changes nothing) and then has a schedule of its own over the steps that are left.

    Raises:
        PhotonError: if `train.freeze_base_steps` would freeze all that is trained, or for the whole run.
    """
    frozen = settings.freeze_base_steps
    if frozen and not new_module_names(base_model(model)):
        raise PhotonError("train.freeze_base_steps is set, but the model has no new modules: set it to 0")
    if frozen >= settings.max_steps:
        raise PhotonError(
            f"train.freeze_base_steps={frozen} leaves no step of train.max_steps={settings.max_steps} for the rest of "
            "the model: lower it"
        )

    def new(step: int) -> float:
        return learning_rate_factor(step, settings.warmup_steps, settings.max_steps)

    def base(step: int) -> float:
        if step < frozen:
            return 0.0
        return learning_rate_factor(step - frozen, settings.warmup_steps, settings.max_steps - frozen)

    return LambdaLR(optimizer, [new if group["is_new"] else base for group in optimizer.param_groups])


def annealed_windows(window: int, seq_len: int) -> list[int]:
    """The windows that annealing goes through: doublings of the final one that are shorter than the text, widest first.

    A window as long as the text would leave the memory without a gradient: the model is then the dense one.
    """
    windows = [window]
    while windows[0] * 2 < seq_len:
        windows.insert(0, windows[0] * 2)
    return windows


def window_schedule(model: nn.Module, settings: TrainSettings) -> list[int]:
    """`annealed_windows` of `model` with `train.window_anneal_steps`, or an empty list where nothing is annealed.

    Raises:
        PhotonError: if the model has no window, or one that sequences of `train.seq_len` leave no room above.
    """
    if not settings.window_anneal_steps:
        return []
    config = base_model(model).config
    if getattr(config, "layout", None) != "stream":
        raise PhotonError(
            "train.window_anneal_steps is set, but the model has no sliding window over its tokens (that takes "
            "photon.layout=stream): set it to 0"
        )
    windows = annealed_windows(config.window, settings.seq_len)
    if len(windows) == 1:
        raise PhotonError(
            f"train.window_anneal_steps is set, but twice the window of {config.window} is not shorter than "
            f"train.seq_len={settings.seq_len}: raise train.seq_len, or set it to 0"
        )
    return windows


def window_at(step: int, windows: list[int], anneal_steps: int) -> int | None:
    """The window of optimiser step `step` (from 0): all but the last of `windows` share `anneal_steps` evenly.

    Returns:
        None from `anneal_steps` on: the model's own.
    """
    return windows[step * (len(windows) - 1) // anneal_steps] if step < anneal_steps else None
