"""Starting values that text gives to the new modules of a converted model."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from photon_train.conversion.apply import rewrite_new_tensors
from photon_train.conversion.presets import target_of

_SEQUENCES, _BATCH, _BATCH_TOKENS = 64, 4, 2**14


def calibration_batches(dataset: Any, most: int = _SEQUENCES) -> list[torch.Tensor]:
    """Token ids of the first sequences of a data set such as `PackedDataset`, in batches of 4 (fewer if they are long).

    Args:
        most: Sequences to take, where there are so many.
    """
    tokens = dataset.batch(torch.arange(min(most, len(dataset))))["input_ids"]
    return list(tokens.split(max(1, min(_BATCH, _BATCH_TOKENS // tokens.shape[1]))))


def calibrate_directory(
    directory: Path, batches: Iterable[torch.Tensor], device: str | torch.device = "cpu"
) -> list[str]:
    """Fit the new modules of the checkpoint in `directory` to text, and rewrite the shard that holds them.

    Made for `convert`'s `on_written`, where the manifest is still to come.

    Returns:
        Names of the parameters that were set.

    Raises:
        PhotonError: if the text is too short, or gives no value.
    """
    target = target_of(AutoConfig.from_pretrained(directory))
    model = target.model.from_pretrained(directory, dtype="auto").to(device)
    names = target.fit(model, list(batches))
    parameters = dict(model.named_parameters())
    rewrite_new_tensors(directory, {name: parameters[name] for name in names})
    return names
