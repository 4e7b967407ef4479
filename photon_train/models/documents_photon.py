"""Packed documents as rows of their own: what lies in one row of the input one after the other does not see each other.

Attention takes the documents of a packed batch apart, as rows that count from their own first token, and puts what it
found back in place; everything that works token by token stays packed. Rows of similar lengths are computed together,
in a fixed number of groups, so that the processes of a sharded training call every module equally often.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch

from .attention_photon import Segment
from .memory_segment_photon import MemorySegment

# Groups of a pass: with four, rows padded to the longest of their group are 1.2 to 1.3 times the text, for lengths that
# spread over two orders of magnitude.
NUM_GROUPS = 4
_STEPS = 4  # lengths that are told apart between a power of two and the next


@dataclass
class Group:
    """Documents of similar lengths.

    Attributes:
        lengths: Tokens of each document.
        tokens: Where in the batch ``[B * T]`` each token of its rows is, ``[n, L]`` flat; a row ends with copies of its
            document's last token.
        is_empty: Whether it stands for a group without documents; it then holds the batch's first token, once.
    """

    lengths: list[int]
    tokens: torch.Tensor
    is_empty: bool = False

    @property
    def longest(self) -> int:
        """L."""
        return max(self.lengths)


@dataclass
class Documents:
    """The documents of a batch ``[B, T]``.

    Attributes:
        batch, columns: B and T.
        groups: `NUM_GROUPS` groups, empty ones last.
        place: For each token of the batch, where it is among all groups' rows, ``[B * T]``; what is no token points to
            some real one.
    """

    batch: int
    columns: int
    groups: list[Group]
    place: torch.Tensor

    @cached_property
    def _filled(self) -> list[Group]:
        return [group for group in self.groups if not group.is_empty]

    @cached_property
    def _all_tokens(self) -> torch.Tensor:
        return torch.cat([group.tokens for group in self.groups])

    @cached_property
    def _filled_tokens(self) -> torch.Tensor:
        return torch.cat([group.tokens for group in self._filled])

    def take_apart(self, states: torch.Tensor, with_empty: bool = True) -> list[torch.Tensor]:
        """``[B, T, ...]`` as rows ``[n, L, ...]`` of every group, or of every group that is not empty."""
        groups, tokens = (self.groups, self._all_tokens) if with_empty else (self._filled, self._filled_tokens)
        rows = states.flatten(0, 1).index_select(0, tokens).split([len(group.tokens) for group in groups])
        return [each.unflatten(0, (-1, group.longest)) for group, each in zip(groups, rows, strict=True)]

    def put_together(self, rows: list[torch.Tensor]) -> torch.Tensor:
        """``[B, T, ...]`` of what `take_apart` gave; empty groups may be left out."""
        flat = torch.cat([each.flatten(0, 1) for each in rows])
        return flat.index_select(0, self.place).unflatten(0, (self.batch, self.columns))


def find_documents(starts: torch.Tensor, lengths: list[int]) -> Documents:
    """The documents of a batch.

    Args:
        starts: Which tokens start a document, ``[B, T]``; the first of each row does.
        lengths: Tokens of each row, the others follow them.
    """
    batch, columns = starts.shape
    first, sizes = [], []
    flat = starts.flatten().nonzero()[:, 0].tolist()
    ends = [*flat[1:], batch * columns]
    for start, end in zip(flat, ends, strict=True):
        row = start // columns
        first.append(start)
        sizes.append(min(end, row * columns + lengths[row]) - start)
    device, groups, place, taken = starts.device, [], torch.empty(batch * columns, dtype=torch.long), 0
    order = sorted(range(len(sizes)), key=sizes.__getitem__)
    for chosen in _divide([sizes[number] for number in order]):
        which = [order[number] for number in chosen]
        length = torch.tensor([sizes[number] for number in which])[:, None]
        begin = torch.tensor([first[number] for number in which])[:, None]
        column = torch.arange(int(length.max()))
        tokens = begin + torch.minimum(column, length - 1)
        slots = taken + torch.arange(tokens.numel()).view(tokens.shape)
        real = column < length
        place[tokens[real]] = slots[real]
        taken += tokens.numel()
        groups.append(Group(length[:, 0].tolist(), tokens.flatten().to(device)))
    # What is no token follows its row's last one.
    column, last = torch.arange(columns), torch.tensor(lengths)[:, None] - 1
    place = place.view(batch, columns).gather(1, torch.minimum(column, last)).flatten()
    nothing = torch.zeros(1, dtype=torch.long, device=device)
    groups += [Group([1], nothing, is_empty=True) for _ in range(NUM_GROUPS - len(groups))]
    return Documents(batch, columns, groups, place.to(device))


def _divide(sizes: list[int]) -> list[range]:
    """Divide documents, in ascending order of `sizes`, into at most `NUM_GROUPS` with the least padding."""
    # Lengths that differ by less than a fifth count as one: how many documents there are does not matter then.
    classes = [math.ceil(_STEPS * math.log2(size)) for size in sizes]
    edges = [0, *(number for number in range(1, len(sizes)) if classes[number] > classes[number - 1]), len(sizes)]
    count = len(edges) - 1
    # Of the documents before each edge: padded tokens, and where they are divided.
    best: list[tuple[float, list[int]]] = [(0, [])] + [(math.inf, [])] * count
    for _ in range(min(NUM_GROUPS, count)):
        best[1:] = [
            min(
                (before + (edges[stop] - edges[begin]) * sizes[edges[stop] - 1], [*cuts, edges[begin]])
                for begin, (before, cuts) in enumerate(best[:stop])
            )
            for stop in range(1, count + 1)
        ]
    cuts = [*best[count][1], len(sizes)]
    return [range(begin, stop) for begin, stop in zip(cuts, cuts[1:], strict=False)]


@dataclass
class DocumentsSegment:
    """A layer's segments, one per group of documents, as the segment of the packed batch.

    Attributes:
        documents: The documents.
        segments: What the layer's attention does in each group.
    """

    documents: Documents
    segments: list[Segment] = field(default_factory=list)

    def attend(self, module, query, key, value, scale, softcap=None, sink_logits=None):
        # Of an empty group only modules with parameters are run.
        with_empty = isinstance(self.segments[0], MemorySegment)
        states = (self.documents.take_apart(each.transpose(1, 2), with_empty) for each in (query, key, value))
        found = [
            segment.attend(module, *(each.transpose(1, 2) for each in rows), scale, softcap, sink_logits).transpose(
                1, 2
            )
            for segment, *rows in zip(self.segments, *states, strict=False)
        ]
        return self.documents.put_together(found).transpose(1, 2)


def in_documents(documents: Documents, make: Callable[[Group], list[Segment]]) -> list[Segment]:
    """One segment per layer over all groups, from what `make` says of each group."""
    return [DocumentsSegment(documents, list(segments)) for segments in zip(*map(make, documents.groups), strict=True)]
