"""Steps that would harm the model: not finite, or far above what the run has seen; they are skipped and counted."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field

from torch import nn

from photon_train.config import TrainSettings
from photon_train.errors import PhotonError

# A run so steady that its deviation is below this share of the mean would call every ripple a spike.
_LEAST_DEVIATION = 0.05


@dataclass
class GuardState:
    """What the guard remembers, in every checkpoint.

    Attributes:
        losses, norms: Of the latest accepted steps, oldest first.
        skipped: Skipped steps of the run.
        in_row: Skipped steps since the last accepted one.
    """

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    skipped: int = 0
    in_row: int = 0


class SpikeGuard:
    """Decides about every optimiser step before it changes a weight.

    A step is skipped when its loss or gradient norm is not finite, or lies more than `train.spike_sigma` standard
    deviations above the mean of the last `train.spike_window` accepted steps (once half as many are known; the rule of
    OLMo's SkipStepOptimizer). Under fp16 a gradient that is not finite is the loss scaler's business.

    All processes must give it the same numbers.
    """

    def __init__(self, settings: TrainSettings, state: GuardState, is_fp16: bool = False) -> None:
        self.settings, self.state, self.is_fp16 = settings, state, is_fp16
        self.loss = self.norm = 0.0
        self.reason: str | None = None

    def see_loss(self, loss: float) -> None:
        """Begin a step with its loss."""
        self.loss, self.norm = loss, math.nan
        self.reason = self._verdict("loss", loss, self.state.losses)

    def see_norm(self, norm: float) -> str | None:
        """Add the step's gradient norm; returns why the step must be skipped, or None."""
        self.norm = norm
        if not (self.is_fp16 and not math.isfinite(norm)):
            self.reason = self.reason or self._verdict("gradient norm", norm, self.state.norms)
        return self.reason

    def _verdict(self, name: str, value: float, recent: list[float]) -> str | None:
        if not math.isfinite(value):
            return f"{name} {value}"
        window, sigma = self.settings.spike_window, self.settings.spike_sigma
        if not sigma or len(recent) < max(2, window // 2):
            return None
        mean = statistics.fmean(recent)
        limit = mean + sigma * max(statistics.pstdev(recent, mean), _LEAST_DEVIATION * abs(mean))
        return f"{name} {value:.4g} above {limit:.4g}" if value > limit else None

    def close(self, step: int) -> str | None:
        """End the step that `see_loss` began; returns why it was skipped, or None.

        Raises:
            PhotonError: if `train.max_skipped_in_row` steps in a row or `train.max_skipped_steps` in all were skipped.
        """
        state, settings = self.state, self.settings
        if self.reason is None:
            state.in_row = 0
            for recent, value in ((state.losses, self.loss), (state.norms, self.norm)):
                if math.isfinite(value):
                    recent.append(value)
                    del recent[: -settings.spike_window]
            return None
        state.skipped += 1
        state.in_row += 1
        total = state.skipped >= settings.max_skipped_steps
        if total or state.in_row >= settings.max_skipped_in_row:
            count = f"{state.skipped} steps" if total else f"{state.in_row} steps in a row"
            key = "train.max_skipped_steps" if total else "train.max_skipped_in_row"
            raise PhotonError(
                f"training diverged at step {step}: {count} were skipped ({key}), the last for its {self.reason}; "
                "lower train.learning_rate and train.new_modules_learning_rate, raise train.warmup_steps, or "
                "look at the data read there"
            )
        return self.reason

    def watch_zero(self, optimizer: nn.Module) -> None:
        """Let a ZeRO optimiser, which clips and steps in one call, drop the steps that the guard refuses.

        Its norm is judged in the moment that it is known, and reported as infinite if the step must not happen:
        DeepSpeed then drops the step and clears the gradients, as after an overflow.
        """
        if hasattr(optimizer, "scaled_global_norm"):  # stages 1 and 2
            of_all = optimizer.scaled_global_norm

            def scaled_global_norm(*args, **kwargs):
                norm = of_all(*args, **kwargs)
                return math.inf if self.see_norm(_whole([norm], optimizer.loss_scale)) else norm

            optimizer.scaled_global_norm = scaled_global_norm
        elif hasattr(optimizer, "_get_norm_groups"):  # stage 3
            of_groups = optimizer._get_norm_groups

            def norm_groups():
                norms = of_groups()
                refused = self.see_norm(_whole(norms, optimizer.loss_scale))
                return [norm * math.inf for norm in norms] if refused else norms

            optimizer._get_norm_groups = norm_groups


def _whole(norms: list, scale: float) -> float:
    """One norm of several groups'; DeepSpeed writes -1 for one that is not finite."""
    values = [float(norm) for norm in norms]
    return math.nan if min(values) < 0 else math.hypot(*values) / float(scale)
