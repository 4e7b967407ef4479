"""Held-out cross-entropy of any causal LM, in one process and without the training's packages."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from photon_train.data.packing import IGNORED_LABEL, PackedDataset
from photon_train.errors import PhotonError

_LARGEST_EXPONENT = 80.0  # beyond it a perplexity says nothing, and e^x overflows soon


def perplexity(cross_entropy: float) -> float:
    """e to the cross-entropy (nats per token), cut off at e^80."""
    return math.exp(min(cross_entropy, _LARGEST_EXPONENT))


@dataclass(frozen=True)
class EvalResult:
    """A loss on held-out text.

    Attributes:
        ce: Mean cross-entropy per target token, in nats.
        tokens: Target tokens: those with a label, without the first of each sequence.
    """

    ce: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """e to the cross-entropy."""
        return perplexity(self.ce)


@torch.no_grad()
def evaluate_loss(
    model: nn.Module,
    dataset: PackedDataset,
    batch_size: int,
    max_sequences: int | None = None,
    as_dense: bool = False,
    mixed_precision: str = "no",
) -> EvalResult:
    """Mean next-token cross-entropy of `model` on the first sequences of `dataset`.

    The number is that of `photon_train.training.loop.evaluate`, which serves models that training has wrapped or
    sharded.

    Args:
        model: A dense or PHOTON causal LM of transformers; it is left as it was.
        dataset: Held-out sequences.
        batch_size: Sequences per forward pass.
        max_sequences: Read at most this many; None reads all.
        as_dense: Evaluate the dense function that a `graft` model holds.
        mixed_precision: ``bf16``, ``fp16`` or ``no``, as in training.

    Raises:
        PhotonError: if no token is a target.
    """
    device = next(model.parameters()).device
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(mixed_precision)
    precision = torch.autocast(device.type, dtype) if dtype else nullcontext()
    options = {"as_dense": True} if as_dense else {}
    was_training = model.training
    model.eval()
    total, tokens = 0.0, 0
    count = len(dataset) if max_sequences is None else min(max_sequences, len(dataset))
    for indices in torch.arange(count).split(batch_size):
        batch = {name: rows.to(device) for name, rows in dataset.batch(indices).items()}
        targets = int(batch["labels"][:, 1:].ne(IGNORED_LABEL).sum())
        if targets:  # the model's mean over no target is 0/0
            with precision:
                loss = model(**batch, use_cache=False, **options).loss
            total, tokens = total + loss.item() * targets, tokens + targets
    model.train(was_training)
    if not tokens:
        raise PhotonError("evaluation: no token of the held-out sequences is a target; give more held-out text")
    return EvalResult(total / tokens, tokens)
