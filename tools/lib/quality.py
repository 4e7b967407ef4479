"""What a conversion costs in quality: the columns of the quality study."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from lib.copying import copy_gain
from photon_train.data.packing import IGNORED_LABEL, PackedDataset
from photon_train.errors import PhotonError

Logits = Callable[[torch.Tensor], torch.Tensor]
# Periods of the repeated text: beyond every local window of a study, at least twice in a sequence of 1024 tokens.
PERIODS = (150, 480)


@dataclass(frozen=True)
class Quality:
    """Measured on held-out text; cross-entropies in nats per token.

    Attributes:
        ce: Over all positions.
        ce_beyond_window: Over the positions that have more than `beyond` tokens before them.
        ce_repeated: On sequences that are periodic (150 to 480 tokens), after their first period.
        copy_gain: Mean over distances of `copying.copy_gain`.
        copy_gains: By distance.
    """

    ce: float
    ce_beyond_window: float
    ce_repeated: float
    copy_gain: float
    copy_gains: dict[int, float]


@torch.no_grad()
def measure_quality(
    model: nn.Module,
    dataset: PackedDataset,
    beyond: int,
    sequences: int = 48,
    seed: int = 0,
    batch_size: int = 8,
    **options: object,
) -> Quality:
    """Measure a dense or PHOTON causal LM on the first `sequences` of held-out text.

    Args:
        model: It is left as it was.
        dataset: Held-out sequences, longer than `beyond` and than 960 tokens.
        beyond: Tokens before a position from which on it counts as beyond the window.
        sequences: Sequences of text, and half as many periodic ones.
        seed: Seed of periods and copied spans: with one seed every model is asked the same.
        batch_size: Sequences per forward pass.
        **options: Passed to the model's forward, such as ``as_dense=True``.

    Raises:
        PhotonError: if the sequences are too short.
    """
    length = dataset.tokens.shape[1]
    if length <= beyond or length < 2 * PERIODS[1]:
        raise PhotonError(
            f"sequences of {length} tokens are too short: take at least {max(beyond + 1, 2 * PERIODS[1])}"
        )
    device = next(model.parameters()).device

    def logits(rows: torch.Tensor) -> torch.Tensor:
        return model(input_ids=rows.to(device), use_cache=False, **options).logits

    was_training = model.training
    model.eval()
    count = min(sequences, len(dataset))
    batch = dataset.batch(torch.arange(count))
    losses, real = token_losses(logits, batch["input_ids"], batch["labels"], batch_size)
    position = torch.arange(1, length)
    repeated, periods = periodic(dataset.tokens[: max(1, count // 2)].long(), seed)
    again, _ = token_losses(logits, repeated, repeated, batch_size)
    gains = copy_gain(logits, dataset, seed=seed, batch_size=batch_size)
    model.train(was_training)
    return Quality(
        ce=losses[real].mean().item(),
        ce_beyond_window=losses[real & (position > beyond)].mean().item(),
        ce_repeated=again[position >= periods[:, None]].mean().item(),
        copy_gain=sum(gains.values()) / len(gains),
        copy_gains=gains,
    )


def token_losses(
    logits: Logits, input_ids: torch.Tensor, labels: torch.Tensor, batch_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of every token but the first, ``[B, T - 1]``, and which of them are targets."""
    targets = labels[:, 1:]
    parts = [
        F.cross_entropy(logits(rows)[:, :-1].float().cpu().flatten(0, 1), wanted.flatten(), reduction="none")
        for rows, wanted in zip(input_ids.split(batch_size), targets.split(batch_size), strict=True)
    ]
    return torch.cat(parts).view_as(targets), targets.ne(IGNORED_LABEL)


def periodic(tokens: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row ``[B, T]`` as its own beginning over and over, and the periods ``[B]``."""
    generator = torch.Generator().manual_seed(seed)
    periods = torch.randint(PERIODS[0], PERIODS[1] + 1, (len(tokens),), generator=generator)
    return tokens.gather(1, torch.arange(tokens.shape[1]) % periods[:, None]), periods
