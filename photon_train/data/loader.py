"""Data order as a function of (seed, step): independent of the number of processes, resumable without replay."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from photon_train.data.packing import PackedDataset


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
    first = step * global_batch_size
    positions = torch.arange(first, first + global_batch_size)
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
) -> Iterator[list[dict[str, Tensor]]]:
    """Yield, without end, the micro-batches of one optimiser step for this process.

    Processes and micro-steps divide the global batch of `batch_size_per_process * gradient_accumulation_steps *
    num_processes` sequences, so any two runs with the same product see the same sequences at the same step. To
    resume after `s` steps pass `start_step=s`.

    Yields:
        `gradient_accumulation_steps` dictionaries of `input_ids` and `labels`, each
        `[batch_size_per_process, seq_len]`.
    """
    division = (gradient_accumulation_steps, num_processes, batch_size_per_process)
    step = start_step
    while True:
        indices = sequence_indices(seed, len(dataset), int(np.prod(division)), step).view(division)
        yield [dataset.batch(micro[process_index]) for micro in indices]
        step += 1
