"""How the sequence of a decoder of the hierarchical model is laid out: groups of slots, then children."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class SlotStream:
    """A decoder's sequence: group g is `num_slots` slots and the children under unit g of the decoder's level.

    Children are tokens at level 1, units of the level below at others. An *element* is a slot or a child. The slots of
    a group are fed as soon as the group before it is complete, so that the open group always has its slots.

    Attributes:
        num_slots: R.
        chunk_size: C, children of a group.
        window: Tokens that an element of one causal stream sees, its own included; None: groups are isolated, and a
            group's last child, which none of its predictions reads, is no element.
        sink_tokens: First tokens that stay visible, with the slots before and between them.
    """

    num_slots: int
    chunk_size: int
    window: int | None = None
    sink_tokens: int = 0

    @property
    def isolated(self) -> bool:
        """Whether elements see their own group alone."""
        return self.window is None

    @property
    def period(self) -> int:
        """Elements of a group."""
        return self.num_slots + self.chunk_size - self.isolated

    def element(self, child: torch.Tensor | int) -> torch.Tensor | int:
        """Index of a child's element, which is also how many elements have been fed before it.

        Of a child that is no element: where the next group begins.
        """
        return child // self.chunk_size * self.period + self.num_slots + child % self.chunk_size

    def position(self, element: torch.Tensor) -> torch.Tensor:
        """Rotary position: inside the group, or in a stream the token's (for a slot that of its chunk's first)."""
        if self.isolated:
            return element % self.period
        inside = (element % self.period - self.num_slots).clamp(min=0)
        return element // self.period * self.chunk_size + inside

    def start(self, element: torch.Tensor) -> torch.Tensor:
        """First element that an element sees, sinks aside; 0 or less: all.

        A stream's slots stand at their chunk's first token: they are seen where it is.
        """
        if self.isolated:
            return element - element % self.period
        first = self.position(element) - self.window + 1
        return self.element(first) - self.num_slots * (first % self.chunk_size == 0)

    @property
    def reach(self) -> int:
        """The most that an element's index exceeds that of the first element it sees by."""
        if self.isolated:
            return self.period - 1
        return self.window - 1 + self.num_slots * math.ceil(self.window / self.chunk_size)

    @property
    def num_sinks(self) -> int:
        """Elements up to the last sink token."""
        return self.element(self.sink_tokens - 1) + 1 if self.sink_tokens else 0

    @property
    def ring_size(self) -> int:
        """Cache slots of a layer beside its sinks.

        A token that completes a chunk is read after the next chunk's slots have been stored behind it.
        """
        return self.reach + 1 + (0 if self.isolated else self.num_slots)
