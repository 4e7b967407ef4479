"""Data order as a function of (seed, step): independent of the number of processes, resumable without replay."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from photon_train.data.packing import PackedDataset
from photon_train.data.retrieval_share import RetrievalShare


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, num_sequences: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng([seed, epoch]).permutation(num_sequences))


def sequence_indices(seed: int, num_sequences: int, global_batch_size: int, step: int) -> Tensor:
    """Indices of the sequences that optimiser step `step` (from 0) sees.

    The data are read in a new random order every epoch, without end; a batch may hold the end of one epoch and the
    start of the next.

    Args:
        seed: A number >= 0.
        num_sequences: Sequences in the data set.
        global_batch_size: Sequences per optimiser step over all processes and micro-steps.
        step: Optimiser step, from 0.

    Returns:
        `[global_batch_size]` int64.
    """
    return _shuffled(seed, num_sequences, torch.arange(global_batch_size) + step * global_batch_size)


def _shuffled(seed: int, num_sequences: int, positions: Tensor) -> Tensor:
    """Indices of the sequences at `positions` of the endless order, from 0."""
    epochs = positions // num_sequences
    result = torch.empty_like(positions)
    for epoch in epochs.unique().tolist():
        inside = epochs == epoch
        result[inside] = _permutation(seed, epoch, num_sequences)[positions[inside] % num_sequences]
    return result


def batches(
    dataset: PackedDataset,
    seed: int,
    batch_size_per_process: int,
    gradient_accumulation_steps: int = 1,
    process_index: int = 0,
    num_processes: int = 1,
    start_step: int = 0,
    retrieval: RetrievalShare | None = None,
) -> Iterator[list[dict[str, Tensor]]]:
    """Yield, without end, the micro-batches of one optimiser step for this process.

    Processes and micro-steps divide the global batch of `batch_size_per_process * gradient_accumulation_steps *
    num_processes` sequences, so any two runs with the same product see the same sequences at the same step. To
    resume after `s` steps pass `start_step=s`.

    Args:
        retrieval: Its sequences take the place of a share; those of `dataset` keep their order, and every one is read
            all the same.

    Yields:
        `gradient_accumulation_steps` dictionaries as `dataset.batch` gives them.
    """
    division = (gradient_accumulation_steps, num_processes, batch_size_per_process)
    count, step = int(np.prod(division)), start_step
    while True:
        positions = (torch.arange(count) + step * count).view(division)
        yield [_read(dataset, seed, micro[process_index], retrieval) for micro in positions]
        step += 1


def _read(dataset: PackedDataset, seed: int, positions: Tensor, retrieval: RetrievalShare | None) -> dict[str, Tensor]:
    """The sequences at `positions` of the endless order of all training sequences."""
    if retrieval is None:
        return dataset.batch(_shuffled(seed, len(dataset), positions))
    made = retrieval.before(positions)
    is_made = retrieval.before(positions + 1) > made
    rows: dict[str, Tensor] = {}
    for where, source, numbers in (
        (~is_made, dataset, _shuffled(seed, len(dataset), positions - made)),
        (is_made, retrieval, made),
    ):
        if bool(where.any()):
            for key, value in source.batch(numbers[where]).items():
                rows.setdefault(key, value.new_empty((len(positions), *value.shape[1:])))[where] = value
    return rows
