"""Starting values that text gives to the new modules of a converted model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from photon_train.conversion.apply import rewrite_new_tensors
from photon_train.conversion.presets import target_of

_SEQUENCES, _TOKENS = 64, 2**17
_BATCH, _BATCH_TOKENS = 4, 2**14


def calibration_batches(dataset: Any) -> list[torch.Tensor]:
    """Token ids of the first sequences of a data set such as `PackedDataset`, in batches of 4 (fewer if they are long).

    64 sequences, or as many as hold 131,072 tokens: the moments of a fit need no more, and a pass over long sequences
    costs as much as training on them.
    """
    tokens = dataset.batch(torch.arange(min(_SEQUENCES, len(dataset))))["input_ids"]
    length = tokens.shape[1]
    tokens = tokens[: max(1, _TOKENS // length)]
    return list(tokens.split(max(1, min(_BATCH, _BATCH_TOKENS // length))))


def calibrate_directory(
    directory: Path,
    batches: Sequence[torch.Tensor],
    device: str | torch.device = "cpu",
    on_batch: Callable[[int, int], None] = lambda done, total: None,
) -> list[str]:
    """Fit the new modules of the checkpoint in `directory` to text, and rewrite the shard that holds them.

    Made for `convert`'s `on_written`, where the manifest is still to come.

    Args:
        batches: Token ids, ``[B, T]`` each.
        on_batch: Is told after each batch how many were read, and of how many: the text may be read several times.

    Returns:
        Names of the parameters that were set.

    Raises:
        PhotonError: if the text is too short, or gives no value.
    """
    target = target_of(AutoConfig.from_pretrained(directory))
    model = target.model.from_pretrained(directory, dtype="auto").to(device)
    names = target.fit(model, batches, on_batch)
    parameters = dict(model.named_parameters())
    rewrite_new_tensors(directory, {name: parameters[name] for name in names})
    return names
