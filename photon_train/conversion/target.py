"""What the kinds of PHOTON models that dense checkpoints are converted to have to say for themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from photon_train.config import RunConfig
from photon_train.conversion.plan import TensorPlan


@dataclass(frozen=True)
class Target:
    """A kind of PHOTON model.

    Attributes:
        model_type: Of its ``config.json``.
        preserves_dense: Whether the converted model is the dense model exactly while its window holds the whole text.
        preset: The preset that a configuration was made by.
        configure: ``(dense configuration, settings) -> configuration``; raises PhotonError, naming the dotted key, for
            settings that this kind or the model cannot serve.
        model: Loads the model's code and gives its class.
        plan: ``(tensor's name, its shape, dense configuration, configuration) -> TensorPlan``.
        fit: ``(converted model, token ids) -> names of the parameters that were set`` from norms, keys and values that
            text gives; token ids are batches ``[B, T]``, real text without padding.
    """

    model_type: str
    preserves_dense: bool
    preset: Callable[[Any], str]
    configure: Callable[[PretrainedConfig, RunConfig], PretrainedConfig]
    model: Callable[[], type[PreTrainedModel]]
    plan: Callable[[str, tuple[int, ...], PretrainedConfig, Any], TensorPlan]
    fit: Callable[[PreTrainedModel, Sequence[torch.Tensor]], list[str]]
