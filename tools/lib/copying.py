"""The copy probe: how many nats a model gains from having seen a span before, far back."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from photon_train.data.packing import PackedDataset
from photon_train.errors import PhotonError

SPAN = 16
DISTANCES = (300, 400, 500, 600)
_PREFIX = 32  # text before the first occurrence


@torch.no_grad()
def copy_gain(
    logits: Callable[[torch.Tensor], torch.Tensor],
    dataset: PackedDataset,
    distances: Sequence[int] = DISTANCES,
    count: int = 16,
    seed: int = 0,
    batch_size: int = 8,
) -> dict[int, float]:
    """Mean gain in nats per token on the second occurrence of a 16-token span, by distance.

    A span of held-out text is put into other held-out text twice, `distance` tokens apart. It is scored at its second
    place, once so and once with an unrelated span at the first place: the difference of the cross-entropies is the
    gain. A model that cannot reach that far back gains nothing; one that copies perfectly gains nearly the span's
    whole cross-entropy.

    Args:
        logits: ``[B, T] -> [B, T, vocabulary]``; position i predicts token i + 1.
        dataset: Held-out sequences, each at least 16 tokens long.
        distances: Tokens from the first occurrence to the second; take them beyond every local window.
        count: Spans per distance.
        seed: Seed of what is drawn: with one seed every model is asked the same.
        batch_size: Sequences per pass.

    Raises:
        PhotonError: if the held-out text is shorter than a probe.
    """
    text = dataset.tokens.flatten().long()
    if dataset.filler is not None:
        text = text[~dataset.filler.flatten()]
    longest = max(distances)
    if len(text) < 2 * (_PREFIX + longest + SPAN):
        raise PhotonError(
            f"copy probe: {len(text)} held-out tokens are too few for a distance of {longest}: give more text"
        )
    gains = {}
    for distance in distances:
        length = _PREFIX + distance + SPAN
        generator = torch.Generator().manual_seed(seed * 100_003 + distance)
        start = torch.randint(len(text) - length + 1, (count,), generator=generator)
        spans = torch.randint(len(text) - SPAN + 1, (2, count), generator=generator)
        rows = text[start[:, None] + torch.arange(length)]
        span, unrelated = (text[first[:, None] + torch.arange(SPAN)] for first in spans)
        rows[:, -SPAN:] = span
        repeated, control = rows.clone(), rows
        repeated[:, _PREFIX : _PREFIX + SPAN] = span
        control[:, _PREFIX : _PREFIX + SPAN] = unrelated
        losses = [_span_loss(logits, sequences, batch_size) for sequences in (control, repeated)]
        gains[distance] = losses[0] - losses[1]
    return gains


def _span_loss(logits: Callable[[torch.Tensor], torch.Tensor], rows: torch.Tensor, batch_size: int) -> float:
    total = 0.0
    for part in rows.split(batch_size):
        predicted = logits(part)[:, -SPAN - 1 : -1].float()
        total += F.cross_entropy(predicted.flatten(0, 1).cpu(), part[:, -SPAN:].flatten(), reduction="sum").item()
    return total / rows[:, -SPAN:].numel()
