"""Several data sets in given proportions, as one."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from photon_train.data.identity import arrays_hash
from photon_train.data.packing import Sequences
from photon_train.errors import PhotonError

_MOST_SEQUENCES = 200_000_000


class Mixture:
    """Sequences of several data sets, evenly interleaved in proportion to weights.

    Its length is the smallest at which every sequence of every data set comes up at least once, so in one epoch a data
    set that its weight favours is read several times. Any beginning has the proportions too (to one sequence per
    source), which is what an evaluation of the first sequences needs.

    Args:
        datasets: Data sets of one sequence length.
        weights: Greater than 0; relative to each other.
    """

    def __init__(self, datasets: Sequence[Sequences], weights: Sequence[float]) -> None:
        self.datasets = list(datasets)
        shares = np.asarray(weights, dtype=np.float64) / sum(weights)
        sizes = np.asarray([len(dataset) for dataset in datasets])
        total = float(np.max(sizes / shares))
        if total > _MOST_SEQUENCES:
            raise PhotonError(
                f"dataset.sources: at these weights one pass over all sources takes {total:.3g} sequences: "
                "give a large source more weight, or less of its text"
            )
        counts = np.maximum(np.ceil(shares * total - 1e-9).astype(np.int64), sizes)
        # Slot j of a source with c slots stands at (j + 1/2) / c of the whole.
        places = np.concatenate([(np.arange(count) + 0.5) / count for count in counts])
        order = np.argsort(places, kind="stable")
        self.source = np.repeat(np.arange(len(sizes), dtype=np.int16), counts)[order]
        self.index = np.concatenate([np.arange(c) % n for c, n in zip(counts, sizes, strict=True)])[order]
        self.num_tokens = sum(dataset.num_tokens for dataset in self.datasets)
        self.num_documents = sum(dataset.num_documents for dataset in self.datasets)
        read = sum(c / n * d.num_tokens for c, n, d in zip(counts, sizes, self.datasets, strict=True))
        positions = sum(
            c / n * d.num_tokens / d.packing_efficiency for c, n, d in zip(counts, sizes, datasets, strict=True)
        )
        self.packing_efficiency = read / positions

    def __len__(self) -> int:
        return len(self.source)

    def content_hash(self) -> str:
        """As `PackedDataset.content_hash`."""
        parts = [*(dataset.content_hash() for dataset in self.datasets), arrays_hash(self.source, self.index)]
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()

    def batch(self, indices: Tensor) -> dict[str, Tensor]:
        """As `PackedDataset.batch`."""
        chosen = indices.numpy()
        source, index = self.source[chosen], torch.from_numpy(self.index[chosen])
        rows: dict[str, Tensor] = {}
        for number in np.unique(source):
            at = torch.from_numpy(np.flatnonzero(source == number))
            for key, value in self.datasets[number].batch(index[at]).items():
                rows.setdefault(key, value.new_empty((len(indices), *value.shape[1:])))[at] = value
        return rows
