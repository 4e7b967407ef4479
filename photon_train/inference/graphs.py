"""Decoding at fixed shapes, on a GPU replayed as CUDA graphs.

A call is made for a number of rows rounded up to a bucket; the last row is repeated, which computes and stores the
same thing twice. Its first run at a bucket is eager (it compiles kernels and finds algorithms), the second is captured,
later ones are replayed: a launch per call in place of one per operation.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from photon_train.inference.cache import PagedCache
from photon_train.models.cache_photon import RowCache

logger = logging.getLogger(__name__)


@dataclass
class StaticCall:
    """A function at one bucket.

    Attributes:
        inputs: Rows and tensors that it reads, ``[bucket, ...]``, always the same memory.
        outputs: What it returned, in the graph's memory once captured.
        graph: Its graph, None before the capture.
    """

    inputs: list[torch.Tensor]
    outputs: Any = None
    graph: Any = None


class StaticCalls:
    """Calls functions at fixed shapes.

    Args:
        cache: Its block table gets its full width, and blocks are read in rounded numbers from here on.
        max_rows: Rows of the largest bucket.
        max_blocks: Blocks of the longest sequence.
        capture: Replay CUDA graphs; False makes the same calls on the same buffers eagerly (on a CPU, in tests).
    """

    def __init__(self, cache: PagedCache, max_rows: int, max_blocks: int, capture: bool) -> None:
        self.cache, self.max_rows, self.capture = cache, max_rows, capture
        self.calls: dict[tuple, StaticCall] = {}
        self._memory = torch.cuda.graph_pool_handle() if capture else None
        cache.fix_shapes(max_blocks)

    def decode(self, model: PreTrainedModel, state: RowCache, ids: torch.Tensor) -> torch.Tensor:
        """Logits ``[n, V]`` after one token ``ids [n, 1]`` for each of the rows that `state` has chosen.

        A cache whose rows are not all treated alike (it has a `run`) has the pieces of a step called here one by one.
        """
        if hasattr(state, "run"):
            state.run = self._run_piece
            return model(ids, past_key_values=state, use_cache=True, logits_to_keep=1).logits[:, -1]

        def step(rows: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
            # Nothing of the host may decide what is computed: graphs are replayed at other lengths.
            state.rows, state.host_lengths, state.is_static = rows, None, True
            out = model(tokens, past_key_values=state, use_cache=True, logits_to_keep=1)
            return out.logits[:, -1]

        try:
            return self("step", step, state.rows, ids)
        finally:
            state.is_static = False

    def _run_piece(self, piece: Callable, level: int, rows: torch.Tensor, *tensors: torch.Tensor) -> Any:
        return self(f"{piece.__name__} {level}", partial(piece, level), rows, *tensors)

    def __call__(self, name: str, function: Callable, rows: torch.Tensor, *tensors: torch.Tensor) -> Any:
        """``function(rows, *tensors)`` of n rows, run at a bucket.

        Args:
            name: Tells functions apart.
            function: Its result has one row per row.
            rows: Rows of the cache, ``[n]``; tensors: ``[n, ...]``.
        """
        number = rows.numel()
        bucket = self.bucket(number)
        table = self.cache.table
        # Graphs hold addresses: a wider table lies elsewhere.
        key = (name, bucket, table.bound, table.blocks.shape[1])
        call = self.calls.get(key)
        seen = call is not None
        if not seen:
            inputs = [states.new_empty(bucket, *states.shape[1:]) for states in (rows, *tensors)]
            call = self.calls[key] = StaticCall(inputs)
        for buffer, states in zip(call.inputs, (rows, *tensors), strict=True):
            buffer[:number] = states
            buffer[number:] = states[-1:]
        if call.graph is None and seen and self.capture:
            self._capture(call, name, function)
        if call.graph is None:
            call.outputs = function(*call.inputs)
        else:
            call.graph.replay()
        return _first(call.outputs, number)

    def bucket(self, number: int) -> int:
        """The power of two that holds `number` rows, at most `max_rows` where that does.

        There are more where a sequence feeds several elements in a step.
        """
        size = 1 << (number - 1).bit_length()
        return min(size, self.max_rows) if number <= self.max_rows else size

    def _capture(self, call: StaticCall, name: str, function: Callable) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._memory):
                call.outputs = function(*call.inputs)
            call.graph = graph
        except RuntimeError as error:
            self.capture = False
            logger.warning("CUDA graphs are off: %s cannot be captured (%s)", name, str(error).split("\n")[0])


def _first(outputs: Any, number: int) -> Any:
    if isinstance(outputs, torch.Tensor):
        return outputs[:number]
    return None if outputs is None else tuple(states[:number] for states in outputs)
