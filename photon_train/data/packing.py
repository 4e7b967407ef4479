"""Documents to token sequences of one length; documents are told apart, or start on chunk boundaries."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import islice
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from photon_train.data.chat import say_left_out, tokenize_chats
from photon_train.data.corpora import Document
from photon_train.data.identity import arrays_hash
from photon_train.data.progress import progress_bar
from photon_train.errors import PhotonError

IGNORED_LABEL = -100
_BATCH_DOCUMENTS = 256
_PIECE_CHARACTERS = 1_000_000
_CHARACTERS_AT_ONCE = 4_000_000  # whose ids, as Python's numbers, take a gigabyte at most


class Sequences(Protocol):
    """What is trained on: `PackedDataset`, or a data set that changes its sequences."""

    def __len__(self) -> int: ...

    def batch(self, indices: Tensor) -> dict[str, Tensor]: ...

    def content_hash(self) -> str: ...


class PackedDataset(torch.utils.data.Dataset):
    """Sequences of `seq_len` tokens in one int32 tensor, with masks of the positions that are not learned.

    Attributes:
        tokens: `[sequences, seq_len]` int32.
        filler: `[sequences, seq_len]` bool, true where the position is alignment or padding; None if nowhere.
        masked: The same shape, true on filler and on text that is read but not learned (what users say); None as above.
        starts: The same shape, true where a document or filler starts; None where documents see each other.
        num_tokens: Positions that hold text (including the end of each document).
        num_documents: Documents that were packed.
        packing_efficiency: `num_tokens` over all positions.
    """

    def __init__(
        self,
        tokens: Tensor,
        filler: Tensor,
        num_documents: int,
        masked: Tensor | None = None,
        starts: Tensor | None = None,
    ) -> None:
        self.tokens = tokens
        self.filler = filler if bool(filler.any()) else None
        self.masked = self.filler if masked is None else masked | filler
        self.starts = starts
        self.num_documents = num_documents
        self.num_tokens = tokens.numel() - int(filler.sum())
        self.packing_efficiency = self.num_tokens / tokens.numel()

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """One sequence, as `batch` gives them."""
        if not -len(self) <= index < len(self):
            raise IndexError(index)  # ends a plain `for` loop over the data set
        return {name: rows[0] for name, rows in self.batch(torch.tensor([index])).items()}

    def content_hash(self) -> str:
        """Hexadecimal digits that differ for other sequences, or others of their tokens learned."""
        return self._content_hash

    @cached_property
    def _content_hash(self) -> str:
        # The run, and every training in it, asks.
        arrays = (self.tokens, self.masked, self.starts)
        return arrays_hash(*(None if array is None else array.numpy() for array in arrays))

    def batch(self, indices: Tensor) -> dict[str, Tensor]:
        """The sequences at `indices` (`[batch]`).

        Returns:
            `input_ids` and `labels`, each `[batch, seq_len]` int64. `labels[i]` is the token at position i (the
            model shifts), or -100 where nothing is learned. Where documents are isolated, also `position_ids`, which
            start again at 0 with each one (as transformers and TRL tell packed documents apart). Its first token then
            has no label: what would predict it is the last state of another document.
        """
        input_ids = self.tokens[indices].long()
        labels = input_ids.clone()
        if self.masked is not None:
            labels.masked_fill_(self.masked[indices], IGNORED_LABEL)
        rows = {"input_ids": input_ids, "labels": labels}
        return rows if self.starts is None else isolated(rows, self.starts[indices])


def isolated(rows: dict[str, Tensor], starts: Tensor) -> dict[str, Tensor]:
    """`rows` of a batch with `position_ids`, and without labels where a document starts.

    Args:
        rows: `input_ids` and `labels`, `[batch, seq_len]`; labels are changed in place.
        starts: Which tokens start a document, the same shape; the first of each row does in any case.
    """
    column = torch.arange(starts.shape[1])
    starts = starts | (column == 0)
    rows["labels"].masked_fill_(starts, IGNORED_LABEL)
    return {**rows, "position_ids": column - (starts * column).cummax(dim=1).values}


def pack(
    documents: Iterable[Document],
    tokenizer: PreTrainedTokenizerBase,
    seq_len: int,
    align: int,
    eos_id: int,
    pad_id: int | None = None,
    *,
    pad_last: bool = False,
    isolate: bool = False,
    progress: bool = True,
) -> PackedDataset:
    """Tokenise and pack documents into sequences.

    Each document is its tokens and `eos_id` (after a BOS token where the tokenizer puts one). Documents follow one
    another; a document that does not fit goes on at position 0 of the next sequence. With `align` > 1 filler stands
    between documents so that each starts on a multiple of `align`: no unit holds tokens of two documents.
    Conversations are written with the chat template instead, and only the assistant's words get labels.

    Args:
        documents: The text.
        tokenizer: Any Hugging Face tokenizer.
        seq_len: Tokens per sequence.
        align: Tokens under the largest unit, or 1 for no alignment.
        eos_id: Token that ends a document.
        pad_id: Token on filler positions; None takes `eos_id`. Their label is -100 in any case.
        pad_last: Fill the last sequence up (evaluation) instead of dropping it (training). If not one sequence is
            full, it is filled up in any case.
        isolate: Tell documents apart, so that models hold them apart (see `PackedDataset.batch`).
        progress: Show progress; pass False on all but the main process.

    Raises:
        PhotonError: if `seq_len` is not a multiple of `align`, or there is no text.
    """
    check_alignment(seq_len, align)
    pad_id = eos_id if pad_id is None else pad_id
    documents = list(documents)
    parts: list[np.ndarray] = []
    read_only: list[tuple[int, np.ndarray]] = []
    edges: list[int] = []
    num_documents = length = 0
    filler_ranges: list[tuple[int, int]] = []
    for _, ids, unlearned in tokenize_documents(documents, tokenizer, eos_id, progress):
        parts.append(ids)
        if unlearned is not None:
            read_only.append((length, unlearned))
        edges.append(length)
        length += len(ids)
        edges.append(length)
        num_documents += 1
        gap = -length % align
        if gap:
            parts.append(np.full(gap, pad_id, dtype=np.int32))
            filler_ranges.append((length, length + gap))
            length += gap
    say_left_out(len(documents) - num_documents, len(documents))
    if not num_documents:
        raise PhotonError("no text to pack: the data holds no document on this side of the split")
    missing = -length % seq_len
    if pad_last or length < seq_len:
        parts.append(np.full(missing, pad_id, dtype=np.int32))
        filler_ranges.append((length, length + missing))
        length += missing
    filler = np.zeros(length, dtype=bool)
    for start, stop in filler_ranges:
        filler[start:stop] = True
    masked = np.zeros(length, dtype=bool) if read_only else None
    for start, unlearned in read_only:
        masked[start : start + len(unlearned)] = unlearned
    starts = np.zeros(length + 1, dtype=bool) if isolate else None
    if isolate:
        starts[edges] = True
    full = length // seq_len * seq_len
    tokens, filler, masked, starts = (
        None if array is None else torch.from_numpy(array[:full].reshape(-1, seq_len))
        for array in (np.concatenate(parts), filler, masked, starts)
    )
    return PackedDataset(tokens, filler, num_documents, masked, starts)


def check_alignment(seq_len: int, align: int) -> None:
    """Check that sequences are made of whole units.

    Raises:
        PhotonError: if `seq_len` is not a multiple of `align`.
    """
    if align < 1 or seq_len < 1 or seq_len % align:
        unit = max(1, align)
        raise PhotonError(
            f"train.seq_len = {seq_len} must be a multiple of the {align} tokens under a unit: "
            f"take {max(1, seq_len // unit) * unit}, or set dataset.align_documents to false"
        )


def tokenize_documents(
    documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase, eos_id: int, progress: bool = False
) -> Iterator[tuple[Document, np.ndarray, np.ndarray | None]]:
    """Each document, its token ids (int32), and for a conversation a bool array, true where nothing is learned.

    A text gets BOS where the tokenizer puts one, and `eos_id`. A conversation in which the assistant says nothing
    teaches nothing and is left out: callers say how many (`chat.say_left_out`).
    """
    bos_id = tokenizer.bos_token_id
    starts_with_bos = bos_id is not None and tokenizer("a")["input_ids"][:1] == [bos_id]
    head = [bos_id] if starts_with_bos else []
    documents = iter(documents)
    with progress_bar(progress, "tokens  {task.fields[rate]:,.0f}/s") as bar:
        task = bar.add_task("tokenising", total=None, rate=0.0)
        while batch := list(islice(documents, _BATCH_DOCUMENTS)):
            is_chat = batch[0].messages is not None
            for row in tokenize_chats(batch, tokenizer) if is_chat else _texts(batch, tokenizer, head, eos_id):
                bar.update(task, advance=len(row[1]), rate=bar.tasks[task].speed or 0.0)
                yield row


def _texts(
    batch: list[Document], tokenizer: PreTrainedTokenizerBase, head: list[int], eos_id: int
) -> Iterator[tuple[Document, np.ndarray, None]]:
    encoded = _encoded((piece for document in batch for piece in _pieces(document.text)), tokenizer)
    for document in batch:
        ids = [head, *islice(encoded, sum(1 for _ in _pieces(document.text))), [eos_id]]
        yield document, np.fromiter((token for part in ids for token in part), dtype=np.int32), None


def _encoded(pieces: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    """The ids of each piece; so many characters at a time that what the tokenizer holds beside them stays bounded."""
    pieces = iter(pieces)
    while waiting := list(_taken(pieces)):
        # `verbose=False`: no warning that a document is longer than the model's context; it is cut by packing.
        settings = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
        yield from tokenizer(waiting, **settings)["input_ids"]


def _taken(pieces: Iterator[str]) -> Iterator[str]:
    size = 0
    while size < _CHARACTERS_AT_ONCE and (piece := next(pieces, None)) is not None:
        size += len(piece)
        yield piece


def _pieces(text: str) -> Iterator[str]:
    """Cut a very long text at line ends: some tokenizers need more than linear time and memory in its length."""
    start = 0
    while len(text) - start > _PIECE_CHARACTERS:
        cut = text.rfind("\n", start, start + _PIECE_CHARACTERS) + 1
        cut = cut if cut > start else start + _PIECE_CHARACTERS
        yield text[start:cut]
        start = cut
    yield text[start:]
