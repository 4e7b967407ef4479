"""How a target tensor's values are made, piece by piece, so that no tensor has to fit in memory twice.

Every operator takes the target's shape, its arguments and the streams of its sources, and yields the target's
elements in order as flat pieces.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from photon_train.conversion.safetensors_io import PIECE_BYTES

Pieces = Iterator[torch.Tensor]
Operator = Callable[[Sequence[int], dict[str, Any], Sequence[Pieces]], Pieces]


def copy(shape: Sequence[int], arguments: dict[str, Any], sources: Sequence[Pieces]) -> Pieces:
    """The one source as it is."""
    (source,) = sources
    yield from source


def split(shape: Sequence[int], arguments: dict[str, Any], sources: Sequence[Pieces]) -> Pieces:
    """Rows of the one source, from row ``arguments["row"]`` on: a part of stacked matrices (or biases)."""
    (source,) = sources
    row_size, count = math.prod(shape[1:]), math.prod(shape)
    skip = arguments["row"] * row_size
    for piece in source:
        part = piece[skip : skip + count]
        skip = max(0, skip - piece.numel())
        count -= part.numel()
        if part.numel():
            yield part
        if not count:
            return


def constant(shape: Sequence[int], arguments: dict[str, Any], sources: Sequence[Pieces]) -> Pieces:
    """``arguments["value"]`` everywhere."""
    for count in _counts(math.prod(shape)):
        yield torch.full((count,), float(arguments["value"]))


def mean_chunk(shape: Sequence[int], arguments: dict[str, Any], sources: Sequence[Pieces]) -> Pieces:
    """A chunker ``[d, C * d]`` that returns the mean of its C inputs: C blocks I / C side by side."""
    hidden, columns = shape
    for begin, end in _rows(hidden, columns):
        block = torch.zeros(end - begin, columns)
        rows = torch.arange(begin, end)
        for offset in range(0, columns, hidden):
            block[rows - begin, offset + rows] = hidden / columns
        yield block.flatten()


def identity_slots(shape: Sequence[int], arguments: dict[str, Any], sources: Sequence[Pieces]) -> Pieces:
    """A converter ``[R * d, d]`` that returns R copies of its input: R blocks I below each other."""
    total, hidden = shape
    for begin, end in _rows(total, hidden):
        block = torch.zeros(end - begin, hidden)
        rows = torch.arange(begin, end)
        block[rows - begin, rows % hidden] = 1.0
        yield block.flatten()


def _counts(total: int) -> Iterator[int]:
    step = PIECE_BYTES // 4
    for begin in range(0, total, step):
        yield min(step, total - begin)


def _rows(total: int, columns: int) -> Iterator[tuple[int, int]]:
    step = max(1, PIECE_BYTES // 4 // columns)
    for begin in range(0, total, step):
        yield begin, min(begin + step, total)


OPERATORS: dict[str, Operator] = {
    operator.__name__: operator for operator in (copy, split, constant, mean_chunk, identity_slots)
}
