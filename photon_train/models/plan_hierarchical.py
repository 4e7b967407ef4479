"""What is new at one level of the hierarchical model in a pass: pure index arithmetic, on the host.

All indices are made on the CPU from the rows' lengths, and say where each piece comes from in a table of states: so
rows of any lengths and phases are computed together. Index -1 stands for zeros, which fill what is not there.
"""

from __future__ import annotations

from functools import cached_property

import torch

from .slot_stream_hierarchical import SlotStream


class LevelPlan:
    """New children, units, groups and elements of the rows that have any at this level.

    A unit is what `chunk_size` children become; group g of the decoder is what lies under unit g, and is opened (its
    slots are fed) when unit g - 1 is complete, the first one with the row's first token.

    Args:
        stream: The sequence of the level's decoder.
        unit_tokens: Tokens under one of its children.
        rows: Rows of the pass with new elements at this level, ``[n]``.
        past, stop: Tokens of each of them before and after the pass, ``[n]``.
        num_children: Width K of the table of new children, at least those of the row with the most.
        single: Every row has one new child at most, and a past: elements are then laid out one by one, not by row.
        least: Units that are computed at least, to give every parameter a gradient.

    Attributes:
        closing: Which of the n rows open a group, ``[m]``.
        num_units, num_groups: Most of a row, U and G.
    """

    def __init__(
        self,
        stream: SlotStream,
        unit_tokens: int,
        rows: torch.Tensor,
        past: torch.Tensor,
        stop: torch.Tensor,
        num_children: int,
        single: bool,
        least: int,
    ) -> None:
        self.stream, self.rows, self.single, self.num_children = stream, rows, single, num_children
        under = unit_tokens * stream.chunk_size
        self.child, self.child_stop = past // unit_tokens, stop // unit_tokens
        self.unit, self.unit_stop = past // under, stop // under
        started = past > 0
        self.group, self.group_stop = torch.where(started, self.unit + 1, 0), self.unit_stop + 1
        self.element = torch.where(started, stream.element(self.child), 0)
        self.element_stop = stream.element(self.child_stop)
        self.closing = (self.group_stop > self.group).nonzero()[:, 0]
        self.num_units = self.num_groups = 0
        if len(self.closing):
            self.num_units = max(least, int((self.unit_stop - self.unit).max()))
            self.num_groups = int((self.group_stop - self.group).max())

    @property
    def closing_rows(self) -> torch.Tensor:
        """Rows of the pass that open a group, ``[m]``."""
        return self.rows[self.closing]

    # --- bottom-up ---

    @property
    def has_open(self) -> bool:
        """Whether a new unit may have children of an earlier pass."""
        return bool((self.child[self.closing] % self.stream.chunk_size).any())

    @cached_property
    def units(self) -> Elements:
        """The new units."""
        return Elements.between(self.unit[self.closing], self.unit_stop[self.closing], self.num_units)

    def chunks(self) -> torch.Tensor:
        """Children of the new units, ``[m, U, C]``: of a table of open ones ``[m, C]``, if any, then new ``[n, K]``."""
        size, closing = self.stream.chunk_size, self.closing[:, None, None]
        child = self.units.index[:, :, None] * size + torch.arange(size)
        child, first = child.expand(len(closing), -1, -1), self.child[closing]
        own, held = closing * self.num_children + child - first, torch.zeros_like(child)
        if self.has_open:
            own = own + len(closing) * size
            held = torch.arange(len(closing))[:, None, None] * size + child % size
        taken = torch.where(child < first, held, own)
        return taken if self.units.valid is None else taken.masked_fill(~self.units.valid[:, :, None], -1)

    def kept(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """New children that may stay in the open chunk: which of the n rows, slot, index in the table ``[n, K]``."""
        child = self.child[:, None] + torch.arange(self.num_children)
        stop = self.child_stop[:, None]
        row, column = ((child < stop) & (child >= stop - self.stream.chunk_size)).nonzero(as_tuple=True)
        return row, child[row, column] % self.stream.chunk_size, row * self.num_children + column

    # --- top-down ---

    def top_conditions(self) -> torch.Tensor | None:
        """Condition of each new group of the top level, ``[m, G]``, in a table of start state and new units per row.

        None where they are just the new units.
        """
        if not bool((self.group[self.closing] == 0).any()):
            return None
        groups = self.groups
        column = groups.index - self.unit[self.closing][:, None]
        taken = torch.arange(len(self.closing))[:, None] * (self.num_units + 1) + column
        return taken if groups.valid is None else taken.masked_fill(~groups.valid, -1)

    @cached_property
    def groups(self) -> Elements:
        """The new groups."""
        return Elements.between(self.group[self.closing], self.group_stop[self.closing], self.num_groups)

    @cached_property
    def elements(self) -> Elements:
        """The new elements; with `single`, one by one, ``[elements, 1]``."""
        by_row = self._elements_by_row
        if not self.single:
            return by_row
        index = by_row.index.expand(len(self.rows), -1)
        return Elements((index.flatten() if by_row.valid is None else index[by_row.valid])[:, None], None)

    @cached_property
    def _elements_by_row(self) -> Elements:
        length = int((self.element_stop - self.element).max())
        return Elements.between(self.element, self.element_stop, length)

    @cached_property
    def row_of_element(self) -> torch.Tensor:
        """With `single`, row of the pass of each element."""
        return self.rows.repeat_interleave(self.element_stop - self.element)

    def sequence(self) -> torch.Tensor:
        """The new elements, as `elements` has them: of a table of new slots ``[m, G, R]``, then children ``[n, K]``."""
        stream, by_row, n, m = self.stream, self._elements_by_row, len(self.rows), len(self.closing)
        group, inside = by_row.index // stream.period, by_row.index % stream.period
        opens = torch.zeros(n, dtype=torch.long)
        opens[self.closing] = torch.arange(m)
        slot = (opens[:, None] * self.num_groups + group - self.group[:, None]) * stream.num_slots + inside
        child = group * stream.chunk_size + inside - stream.num_slots - self.child[:, None]
        child = child + torch.arange(n)[:, None] * self.num_children + m * self.num_groups * stream.num_slots
        taken = torch.where(inside < stream.num_slots, slot, child)
        if by_row.valid is None:
            return taken.reshape(-1, 1) if self.single else taken
        return taken[by_row.valid][:, None] if self.single else taken.masked_fill(~by_row.valid, -1)

    def next_tokens(self) -> torch.Tensor:
        """Output that predicts the token after each new one, ``[n, K]``, in the table of the decoder's outputs."""
        child = self.child[:, None] + torch.arange(self.num_children)
        element = self.stream.element(child + 1) - 1 if self.stream.isolated else self.stream.element(child)
        return self._outputs(element, child < self.child_stop[:, None])

    def predictions(self, below: LevelPlan) -> torch.Tensor:
        """Output that predicts the unit under each new group of the level below, ``[n, G below]``."""
        valid = below.groups.valid
        index = below.groups.index.expand(len(self.rows), -1)
        return self._outputs(self.stream.element(index) - 1, torch.ones_like(index) > 0 if valid is None else valid)

    def _outputs(self, element: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        counts = self.element_stop - self.element
        if self.single:
            first = counts.cumsum(0) - counts
        else:
            first = torch.arange(len(counts)) * self.elements.length
        return (first[:, None] + element - self.element[:, None]).masked_fill(~valid, -1)


class Elements:
    """Consecutive new elements (or units, or groups) of rows.

    Attributes:
        index: ``[n, T]``, or ``[1, T]`` where all rows begin alike; valid: which are real, ``[n, T]``, or None: all.
    """

    def __init__(self, index: torch.Tensor, valid: torch.Tensor | None) -> None:
        self.index, self.valid = index, valid

    @classmethod
    def between(cls, first: torch.Tensor, stop: torch.Tensor, length: int) -> Elements:
        """``first ... stop - 1`` of each row, in `length` columns."""
        index = first[:, None] + torch.arange(length)
        valid = index < stop[:, None]
        if bool((first == first[0]).all()):
            index = index[:1]
        return cls(index, None if bool(valid.all()) else valid)

    @property
    def length(self) -> int:
        """T."""
        return self.index.shape[1]
