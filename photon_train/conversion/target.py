"""What the kinds of PHOTON models that dense checkpoints are converted to have to say for themselves, and share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from photon_train.config import RunConfig
from photon_train.conversion.families import stored_as
from photon_train.conversion.plan import TensorPlan
from photon_train.layouts import LAYOUTS

# Roles of the dense tensors outside the layers, which keep their names.
ROLES = {
    "model.embed_tokens.weight": "embedding",
    **{f"model.{layout.final_norm}.weight": "final norm" for layout in LAYOUTS.values()},
    "lm_head.weight": "head",
}
NUM_SINKS = 4


def default_window(dense: PretrainedConfig) -> int:
    """Tokens of a window where the user names none; a small model (such as the demo's) has short texts."""
    return 64 if dense.hidden_size <= 512 else 512


def copied(
    name: str, shape: tuple[int, ...], dense: PretrainedConfig, role: str, level: int = 0, source: str | None = None
) -> TensorPlan:
    """The plan of a tensor that is the dense model's `source` (default: of the same name), wherever that is stored."""
    stored, row = stored_as(dense, source or name)
    operator, arguments = ("copy", {}) if row is None else ("split", {"row": row})
    return TensorPlan(name, operator, role, level, shape, (stored,), arguments)


@dataclass(frozen=True)
class Target:
    """A kind of PHOTON model.

    Attributes:
        preserves_dense: Whether the converted model is the dense model exactly while its window holds the whole text.
        preset: The preset that a configuration was made by.
        configure: ``(dense configuration, settings) -> configuration``; raises PhotonError, naming the dotted key, for
            settings that this kind or the model cannot serve.
        model: The model's class.
        plan: ``(tensor's name, its shape, dense configuration, configuration) -> TensorPlan``.
        fit: ``(converted model, token ids, report) -> names of the parameters that were set`` from norms, keys and
            values that text gives; token ids are batches ``[B, T]``, real text without padding; ``report(done, total)``
            is called after each batch.
    """

    preserves_dense: bool
    preset: Callable[[Any], str]
    configure: Callable[[PretrainedConfig, RunConfig], PretrainedConfig]
    model: type[PreTrainedModel]
    plan: Callable[[str, tuple[int, ...], PretrainedConfig, Any], TensorPlan]
    fit: Callable[[PreTrainedModel, Sequence[torch.Tensor], Callable[[int, int], None]], list[str]]
