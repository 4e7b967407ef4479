"""From a padded batch to rows of tokens that begin at column 0 and count from their own first token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers.modeling_outputs import ModelOutput

from .cache_photon import RowCache
from .documents_photon import Documents, Group, find_documents


@dataclass
class Rows:
    """The new tokens of a pass.

    Attributes:
        batch, columns: Size of the input.
        index: Position of each token in its row, ``[B, T]``, or ``[1, T]`` where all rows agree.
        base: The first position of all rows on the host, where they agree; else None.
        valid: Which tokens are real, ``[B, T]``, the others follow them; None: all.
        lengths: New tokens of each row, ``[B]``; past: tokens before them, ``[B]``.
        host_lengths, host_past: The same on the host; `host_past` is None where the host may not decide anything.
        order: Column of the input that each token of a row comes from, ``[B, T]``; None: they are the same.
        place: Where in its row each column of the input is, ``[B, T]``, or None.
        rows: Rows of the cache, ``[B]``; None: all.
        documents: The documents that the rows are made of, where positions are given and there is no cache; `index`
            then counts each one's tokens.
        varies: Whether these rows are documents, whose number and length differ from pass to pass.
    """

    batch: int
    columns: int
    index: torch.Tensor
    base: int | None
    valid: torch.Tensor | None
    lengths: torch.Tensor
    past: torch.Tensor
    host_lengths: list[int]
    host_past: list[int] | None
    order: torch.Tensor | None = None
    place: torch.Tensor | None = None
    rows: torch.Tensor | None = None
    documents: Documents | None = None
    varies: bool = False

    @property
    def has_past(self) -> bool:
        """Whether any row has tokens in the cache."""
        return self.host_past is None or any(self.host_past)

    @property
    def longest(self) -> int | None:
        """Tokens of the longest row, the new ones included; None where the host may not know."""
        if self.host_past is None:
            return None
        return max(had + new for had, new in zip(self.host_past, self.host_lengths, strict=True))

    def gather(self, states: torch.Tensor) -> torch.Tensor:
        """``[B, T, d]`` of the input, by row."""
        return states if self.order is None else _take(states, self.order)

    def scatter(self, out: ModelOutput) -> ModelOutput:
        """The output's states ``[B, T, d]`` back in the columns of the input."""
        if self.place is not None:
            out.last_hidden_state = _take(out.last_hidden_state, self.place)
            if out.get("hidden_states") is not None:
                out.hidden_states = tuple(_take(states, self.place) for states in out.hidden_states)
        return out


def document_rows(group: Group) -> Rows:
    """The documents of a group as rows; what fills them up counts as tokens, which no real one sees."""
    device, batch, longest = group.tokens.device, len(group.lengths), group.longest
    past, index = torch.zeros(batch, dtype=torch.long, device=device), torch.arange(longest, device=device)[None]
    counts, none = [longest] * batch, [0] * batch
    return Rows(batch, longest, index, 0, None, past + longest, past, counts, none, varies=True)


def has_restarts(position_ids: torch.Tensor, mask: torch.Tensor | None) -> bool:
    """Whether ``position_ids [B or 1, T]`` start again at 0 after a row's first token: documents are packed.

    Input that `align_rows` refuses is left to it.
    """
    if position_ids.dim() != 2 or (mask is not None and mask.dim() != 2):
        return False
    real = torch.ones_like(position_ids, dtype=torch.bool) if mask is None else mask[:, -position_ids.shape[1] :].bool()
    return bool(((position_ids == 0) & real & (real.cumsum(1) > 1)).any())


def _take(states: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    return states.gather(1, columns[:, :, None].expand(-1, -1, states.shape[2]))


def align_rows(
    mask: torch.Tensor | None, position_ids: torch.Tensor | None, embeds: torch.Tensor, cache: RowCache | None
) -> Rows:
    """The rows of an input.

    Args:
        mask: ``[B, T]`` or ``[B, cached + T]``, 1 for tokens; None: all are.
        position_ids: ``[B or 1, T]``, or None. Where they start again at 0, another document starts; else they are only
            checked.
        embeds: ``[B, T, d]``.
        cache: Holds what came before; None: nothing did.

    Raises:
        ValueError: for an input without tokens, a row without any (nor a past), a mask or position_ids of another
            shape, and position_ids that do not count each document's tokens one by one, or restart where there is a
            cache.
    """
    batch, columns = embeds.shape[:2]
    if not batch or not columns:
        raise ValueError(f"the input has no tokens (batch {batch}, length {columns}): give at least one")
    if mask is not None and (mask.dim() != 2 or mask.shape[0] != batch or mask.shape[1] < columns):
        raise ValueError(f"PHOTON takes a 2-D attention_mask [batch, length], not {list(mask.shape)}")
    if position_ids is not None and position_ids.dim() != 2:
        raise ValueError(f"PHOTON takes 2-D position_ids [batch or 1, length], not {list(position_ids.shape)}")
    device, rows = embeds.device, None
    if cache is None:
        past, host_past = torch.zeros(batch, dtype=torch.long, device=device), [0] * batch
    else:
        (past, host_past), rows = cache.past_lengths(), cache.rows
        if len(past) != batch:
            raise ValueError(f"past_key_values holds {len(past)} rows, the input {batch}: they must be as many")
    real = None if mask is None else mask[:, -columns:].bool()
    if real is not None and bool(real.all()):
        real = None
    order = place = valid = None
    lengths, host_lengths = torch.full((batch,), columns, device=device), [columns] * batch
    column = torch.arange(columns, device=device)
    if real is not None:
        lengths = real.sum(1)
        host_lengths = lengths.tolist()
        for row, (new, had) in enumerate(zip(host_lengths, host_past or [1] * batch, strict=True)):
            if not new + had:
                raise ValueError(f"attention_mask has no token in row {row}")
        valid = column < lengths[:, None]
        if not bool((real == valid).all()):
            # Stable: tokens keep their order, and what is no token follows them.
            order = torch.argsort(~real, dim=1, stable=True)
            place = torch.argsort(order, dim=1)
    agree = real is None and host_past is not None and len(set(host_past)) == 1
    index = (past[:1] if agree else past)[:, None] + column
    base, documents = host_past[0] if agree else None, None
    if position_ids is not None and columns > 1:
        given = position_ids.expand(batch, -1)
        given = given if order is None else given.gather(1, order)
        starts = _document_starts(given, valid, may_restart=cache is None)
        if cache is None:
            # Also where nothing restarts: another process of a sharded training may have a batch that does.
            documents = find_documents(starts, host_lengths)
            index = column - (starts * column).cummax(dim=1).values
    return Rows(
        batch, columns, index, base, valid, lengths, past, host_lengths, host_past, order, place, rows, documents
    )


def _document_starts(given, valid, may_restart: bool) -> torch.Tensor:
    """Which tokens start a document, ``[B, T]``: the first of a row, and those at position 0."""
    column = torch.arange(given.shape[1], device=given.device)
    starts = (given == 0) & (column > 0)
    if valid is not None:
        starts = starts & valid
    if not may_restart and bool(starts.any()):
        raise ValueError(
            "position_ids start again at 0, which says that documents are packed; those are read whole: leave "
            "past_key_values out, or give use_cache=False"
        )
    starts = starts | (column == 0)
    begin = (starts * column).cummax(dim=1).values
    # Of a row's first document, positions may begin anywhere: with a cache, and where a text was cut.
    wrong = given - (column - begin) != torch.where(begin == 0, given[:, :1], 0)
    if valid is not None:
        wrong = wrong & valid
    if bool(wrong.any()):
        raise ValueError(
            "position_ids must count the tokens of each row, or of each of its documents from 0 on, one by one: leave "
            "them out, PHOTON derives positions from attention_mask"
        )
    return starts
