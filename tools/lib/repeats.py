"""Sequences that need a long context: text that comes back after a distance.

Small models trained on plain text alone learn late, or never, to use what lies beyond a few dozen tokens. A share of
periodic sequences and of repeated spans teaches the retrieval that long documents ask for.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from photon_train.data.packing import Sequences

_MIN_PERIOD = 16
_SPAN = (8, 48)  # shortest and longest repeated span, tokens
_TOKENS_PER_SPAN = 96  # one repeated span per so many tokens


@dataclass(frozen=True)
class Repeats:
    """A data set some of whose sequences repeat themselves; the same index always gives the same sequence.

    A share `periodic` of the sequences is their own beginning over and over, with a period drawn between 16 tokens
    and half the sequence. In a share `spans`, runs of 8 to 48 tokens are copied over a later place.

    Attributes:
        dataset: The text.
        periodic, spans: Shares between 0 and 1, together at most 1.
        min_period: Shortest period, tokens.
        seed: Seed of what is drawn.
    """

    dataset: Sequences
    periodic: float
    spans: float = 0.0
    min_period: int = _MIN_PERIOD
    seed: int = 0

    def __len__(self) -> int:
        return len(self.dataset)

    def content_hash(self) -> str:
        """As `PackedDataset.content_hash`."""
        drawn = [self.periodic, self.spans, self.min_period, self.seed]
        return hashlib.sha256(f"{self.dataset.content_hash()} {drawn}".encode()).hexdigest()

    def batch(self, indices: Tensor) -> dict[str, Tensor]:
        """As `PackedDataset.batch`; in a changed sequence every token has a label."""
        batch = self.dataset.batch(indices)
        for row, index in enumerate(indices.tolist()):
            generator = np.random.default_rng([self.seed, index])
            draw = generator.random()
            if draw < self.periodic:
                tokens = _periodic(batch["input_ids"][row], self.min_period, generator)
            elif draw < self.periodic + self.spans:
                tokens = _with_spans(batch["input_ids"][row], generator)
            else:
                continue
            batch["input_ids"][row] = tokens
            batch["labels"][row] = tokens
        return batch


def _periodic(tokens: Tensor, least: int, generator: np.random.Generator) -> Tensor:
    length = tokens.shape[0]
    period = int(generator.integers(least, length // 2 + 1))
    return tokens[torch.arange(length) % period]


def _with_spans(tokens: Tensor, generator: np.random.Generator) -> Tensor:
    tokens, length = tokens.clone(), tokens.shape[0]
    for _ in range(max(1, length // _TOKENS_PER_SPAN)):
        size = int(generator.integers(_SPAN[0], min(_SPAN[1], length // 4) + 1))
        source = int(generator.integers(0, length - 2 * size + 1))
        target = int(generator.integers(source + size, length - size + 1))
        tokens[target : target + size] = tokens[source : source + size].clone()
    return tokens
