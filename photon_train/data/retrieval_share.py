"""The share of a training's sequences that is synthetic retrieval, made of its own text while it runs."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from photon_train.data.packing import IGNORED_LABEL, Sequences, isolated
from photon_train.data.retrieval import (
    Sample,
    list_sample,
    longest_fact,
    needle_sample,
    plain_text,
    shortest_span_sample,
    span_sample,
    without_special,
)
from photon_train.errors import PhotonError

_STREAM = 7_365_811  # sets the random numbers of this module apart from others of the same seed
# Facts that the shortest sample must hold: as many as keep what is asked, and stated, within half of it.
_FACTS = 4
_MOST = 16  # needles, questions and spans of a sample at most
_MOST_RECORDS = 64
_MOST_READ = 8  # sequences that the text of a sample is taken from


class RetrievalShare:
    """An endless row of synthetic sequences: the same number always gives the same one.

    A sequence holds 1, 2, 4 or 8 samples of equal length, each a document: needles, key-value lists and repeated spans
    in equal parts. Nothing is learned where what stands there is drawn: the loss is on the answers and on real text,
    which costs nothing more to learn on the way; of conversations it is on what the assistant says, and of spans in
    their text on the repetition. Answers are so many, of many facts at a time, that they need no weight of their own.

    Args:
        text: The training sequences whose text is used.
        tokenizer: Theirs.
        share: Part of all training sequences, greater than 0, at most 1.
        seq_len: Tokens per sequence.
        seed: Seed of everything that is drawn.
        align: Samples start at multiples of it.
        chat: Write questions as conversations.
        isolate: Tell samples apart, as `packing.pack`.

    Raises:
        PhotonError: if a sequence is too short for a question, or the tokenizer has no digits.
    """

    def __init__(
        self,
        text: Sequences,
        tokenizer: PreTrainedTokenizerBase,
        share: float,
        seq_len: int,
        seed: int,
        align: int = 1,
        chat: bool = False,
        isolate: bool = False,
    ) -> None:
        self.text, self.tokenizer, self.seq_len, self.seed = text, tokenizer, seq_len, seed
        self.chat, self.isolate = chat, isolate
        self.share, self._exact_share = share, Fraction(share).limit_denominator(10**6)
        if tokenizer.decode(tokenizer("1234567", add_special_tokens=False)["input_ids"]).strip() != "1234567":
            raise PhotonError(
                "dataset.retrieval_share asks for numbers and the tokenizer cannot write them: set it to 0"
            )
        self._head, frame = _chat_frame(tokenizer) if chat else (0, 0)
        self._fact = longest_fact(tokenizer) + frame
        least = max(self._head + _FACTS * self._fact, shortest_span_sample(tokenizer))
        if seq_len < least:
            raise PhotonError(
                f"dataset.retrieval_share: {seq_len} tokens are too few to hide statements in and ask for them: set "
                f"train.seq_len to {least} or more, or dataset.retrieval_share to 0"
            )
        self._parts = [
            parts for parts in (1, 2, 4, 8) if seq_len % (parts * align) == 0 and seq_len // parts >= least
        ] or [1]

    def before(self, positions: Tensor) -> Tensor:
        """How many of all training sequences before each of `positions` are synthetic: they are spread evenly."""
        return positions * self._exact_share.numerator // self._exact_share.denominator

    def batch(self, numbers: Tensor) -> dict[str, Tensor]:
        """Synthetic sequences, as `PackedDataset.batch`.

        Args:
            numbers: Which of the endless row, ``[batch]``.
        """
        sequences = [self._sequence(number) for number in numbers.tolist()]
        ids = torch.stack([torch.cat([sample.ids for sample in sequence]) for sequence in sequences])
        learned = torch.stack([torch.cat([sample.learned for sample in sequence]) for sequence in sequences])
        rows = {"input_ids": ids, "labels": ids.masked_fill(~learned, IGNORED_LABEL)}
        if not self.isolate:
            return rows
        column, sizes = torch.arange(self.seq_len), [len(sequence[0].ids) for sequence in sequences]
        return isolated(rows, column % torch.tensor(sizes)[:, None] == 0)

    def _sequence(self, number: int) -> list[Sample]:
        state = np.random.SeedSequence([self.seed, _STREAM, number]).generate_state(1, np.uint64)[0]
        generator = torch.Generator().manual_seed(int(state >> np.uint64(1)))
        parts = self._parts[_draw(0, len(self._parts) - 1, generator)]
        return [self._sample(self.seq_len // parts, generator) for _ in range(parts)]

    def _sample(self, length: int, generator: torch.Generator) -> Sample:
        text, kind = self._some_text(length, generator), _draw(0, 2, generator)
        # Statements and questions together take half of the sample at most.
        most = (length - self._head) // (2 * self._fact)
        if kind == 0:
            needles = _draw_log(min(most, _MOST), generator)
            return needle_sample(text, self.tokenizer, length, generator, needles, self.chat)
        if kind == 1:
            records = _draw(2, max(2, min(most, _MOST_RECORDS)), generator)
            questions = _draw_log(min(records, _MOST), generator)
            return list_sample(text, self.tokenizer, length, generator, records, questions, self.chat)
        spans = _draw_log(max(1, min(length // 256, _MOST)), generator)
        return span_sample(text, self.tokenizer, length, generator, spans, only_answers=self.chat)

    def _some_text(self, length: int, generator: torch.Generator) -> Tensor:
        """Text of sequences that are drawn until it has `length` tokens; fewer where they hold little but filler."""
        tokens = torch.zeros(0, dtype=torch.long)
        for _ in range(_MOST_READ):
            index = torch.randint(len(self.text), (1,), generator=generator)
            tokens = torch.cat([tokens, without_special(self.text.batch(index)["input_ids"][0], self.tokenizer)])
            if len(tokens) >= length:
                break
        return plain_text(tokens, self.tokenizer)


def _chat_frame(tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    """Tokens that a conversation has beside what is said: of its first round with what precedes it, of each other."""
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}]
    one, two = (len(tokenizer.apply_chat_template(said * rounds, return_dict=True)["input_ids"]) for rounds in (1, 2))
    return one, two - one


def _draw(least: int, most: int, generator: torch.Generator) -> int:
    return int(torch.randint(least, most + 1, (), generator=generator))


def _draw_log(most: int, generator: torch.Generator) -> int:
    """Of 1 ... `most`, small numbers as often as large ones."""
    return int(math.exp(float(torch.rand((), generator=generator)) * math.log(most + 1)))
