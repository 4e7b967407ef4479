"""The parts of a decoding step at fixed shapes, on a GPU replayed as CUDA graphs.

A part (see `TokenStepper`) is run for a number of rows rounded up to a bucket; the last row is repeated, which computes
and stores the same thing twice. Its first run at a bucket is eager (it compiles kernels and finds algorithms), the
second is captured, later ones are replayed: a launch per part in place of one per operation. Which chunks close remains
a decision of the host: no part is masked, and none runs for rows that do not need it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from photon_train.inference.cache import PagedCache

logger = logging.getLogger(__name__)


@dataclass
class StaticCall:
    """A part at one bucket.

    Attributes:
        inputs: Rows and tensors that it reads, ``[bucket, ...]``, always the same memory.
        outputs: What it returned, in the graph's memory once captured.
        graph: Its graph, None before the capture.
    """

    inputs: list[torch.Tensor]
    outputs: Any = None
    graph: Any = None


class StaticParts:
    """Runs parts at fixed shapes; an argument `run` of `TokenStepper`.

    Args:
        cache: Its page table gets its full width, and pages are read in rounded numbers from here on.
        max_rows: Rows of the largest bucket.
        max_pages: Pages of the longest sequence.
        capture: Replay CUDA graphs; False runs the same calls on the same buffers eagerly (on a CPU, in tests).
    """

    def __init__(self, cache: PagedCache, max_rows: int, max_pages: int, capture: bool) -> None:
        self.cache, self.max_rows, self.capture = cache, max_rows, capture
        self.calls: dict[tuple, StaticCall] = {}
        self._memory = torch.cuda.graph_pool_handle() if capture else None
        cache.fix_shapes(max_pages)

    def __call__(self, part: Callable, level: int, rows: torch.Tensor, *tensors: torch.Tensor) -> Any:
        number = rows.numel()
        bucket = self.bucket(number)
        table = self.cache.table
        # Graphs hold addresses: a wider table lies elsewhere.
        key = (part.__name__, level, bucket, table.bound, table.pages.shape[1])
        call = self.calls.get(key)
        seen = call is not None
        if not seen:
            inputs = [states.new_empty(bucket, *states.shape[1:]) for states in (rows, *tensors)]
            call = self.calls[key] = StaticCall(inputs)
        for buffer, states in zip(call.inputs, (rows, *tensors), strict=True):
            buffer[:number] = states
            buffer[number:] = states[-1:]
        if call.graph is None and seen and self.capture:
            self._capture(call, part, level)
        if call.graph is None:
            call.outputs = part(level, *call.inputs)
        else:
            call.graph.replay()
        return _first(call.outputs, number)

    def bucket(self, number: int) -> int:
        """The power of two that holds `number` rows, at most `max_rows`."""
        return min(1 << (number - 1).bit_length(), self.max_rows)

    def _capture(self, call: StaticCall, part: Callable, level: int) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._memory):
                call.outputs = part(level, *call.inputs)
            call.graph = graph
        except RuntimeError as error:
            self.capture = False
            logger.warning("CUDA graphs are off: %s cannot be captured (%s)", part.__name__, str(error).split("\n")[0])


def _first(outputs: Any, number: int) -> Any:
    if isinstance(outputs, torch.Tensor):
        return outputs[:number]
    return None if outputs is None else tuple(states[:number] for states in outputs)
