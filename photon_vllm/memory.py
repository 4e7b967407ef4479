"""A layer's memory on one of several tensor-parallel ranks: packed and stored by all, read by each for its heads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)

from photon_train.models.configuration_photon import PhotonConfig
from photon_train.models.memory_photon import LayerMemory, take_heads
from photon_train.models.stores_photon import KeyValue


class RankMemory(LayerMemory):
    """A layer's memory whose `cells`, `query_heads` and others are those of this rank, by its own numbers.

    Keys and values of a unit's cells lie on several ranks, and one latent holds them all: they are summed over the
    ranks, each giving its own, once per unit. Latents are replicated, as those of multi-head latent attention are.
    """

    def __init__(self, config: PhotonConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.ranks, rank = get_tensor_model_parallel_world_size(), get_tensor_model_parallel_rank()
        all_heads, groups = config.num_key_value_heads, config.num_attention_heads // config.num_key_value_heads
        count = max(1, all_heads // self.ranks)
        # Where there are more ranks than heads, several have the same head and a part of its queries each.
        copies = max(1, self.ranks // all_heads)
        first = rank // copies * count
        groups //= copies
        self.own = tuple(at for at, head in enumerate(self.cells) if first <= head < first + count)
        self.gives = rank % copies == 0
        self.cells = tuple(self.cells[at] - first for at in self.own)
        self.other_cells = tuple(head for head in range(count) if head not in self.cells)
        self.query_heads, self.other_query_heads = (
            tuple(head * groups + group for head in heads for group in range(groups))
            for heads in (self.cells, self.other_cells)
        )

    def take_cells(self, states: torch.Tensor) -> torch.Tensor:
        """``[B, Hkv of the rank, E, D]`` of its cells."""
        return take_heads(states, self.cells)

    def pack(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[KeyValue, tuple[torch.Tensor, ...]]:
        return super().pack(*(self._gather(states) for states in (keys, values)))

    def _gather(self, states: torch.Tensor) -> torch.Tensor:
        """``[B, m of the rank, E, D]`` -> those of all ranks, ``[B, m, E, D]``."""
        if self.ranks == 1:
            return states
        all_cells = states.new_zeros(states.shape[0], self.heads, *states.shape[2:])
        if self.gives and self.own:
            all_cells[:, list(self.own)] = states
        return tensor_model_parallel_all_reduce(all_cells)

    def unpack(self, keys: torch.Tensor, values: torch.Tensor) -> KeyValue:
        return tuple(take_heads(states, self.own) for states in super().unpack(keys, values))

    def _with_map(self, half: int, use: Callable[[torch.Tensor, torch.Tensor], Any]) -> Any:
        own = list(self.own)
        return super()._with_map(half, lambda matrix, bias: use(matrix[:, own], bias[:, own]))
