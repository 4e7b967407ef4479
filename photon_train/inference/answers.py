"""Answers in the shapes of OpenAI's completions and chat completions."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel

from photon_train.inference.request import Event, TokenScore
from photon_train.inference.tokens import TokenWriter


@dataclass
class Choice:
    """One continuation as it comes.

    Attributes:
        index: Its number in the answer.
        events: Its tokens.
        place: Which of the prompts it continues.
    """

    index: int
    events: list[Event] = field(default_factory=list)
    place: int = 0

    @property
    def text(self) -> str:
        """What has become final."""
        return "".join(event.text for event in self.events)

    @property
    def mean_logprob(self) -> float:
        """Mean log-probability per token."""
        return sum(event.logprob for event in self.events) / len(self.events)


@dataclass(frozen=True)
class Echo:
    """A prompt that is given back before its continuation.

    Attributes:
        text: As it was given; of token ids, what they stand for.
        tokens: Token ids.
    """

    text: str
    tokens: list[int]

    def offsets(self, writer: TokenWriter) -> list[int]:
        """Where each token's text begins in `text`; near that where the tokenizer has changed the text."""
        begins, begin = [], 0
        for token in self.tokens:
            begins.append(begin)
            # Bytes 10xxxxxx go on with a character.
            begin += sum(byte & 0xC0 != 0x80 for byte in writer.bytes(token))
        # What the tokenizer puts before a text is no part of it.
        added = max(0, begin - len(self.text))
        return [min(max(0, begin - added), len(self.text)) for begin in begins]


class Style:
    """How answers of one kind look.

    Args:
        writer: Writes tokens of log-probabilities.
        logprobs: How many of the most probable tokens are given with every token; None: no log-probabilities.
        echoes: The prompts, if they are given back.
        with_answer: Whether anything but the prompts is.
        with_prompt_logprobs: Whether the log-probabilities of the prompts are given by themselves.
    """

    object_name = "text_completion"
    chunk_name = "text_completion"
    prefix = "cmpl"

    def __init__(
        self,
        writer: TokenWriter,
        logprobs: int | None,
        echoes: list[Echo] | None = None,
        with_answer: bool = True,
        with_prompt_logprobs: bool = False,
    ) -> None:
        self.writer, self.logprobs, self.echoes = writer, logprobs, echoes
        self.with_answer, self.with_prompt_logprobs = with_answer, with_prompt_logprobs

    def opening(self, index: int) -> dict[str, Any] | None:
        """A chunk before the first token, or None."""
        return None

    def whole(self, choice: Choice) -> dict[str, Any]:
        """A finished continuation."""
        written = self._choice(choice.index, choice.text, choice.events, echo=self._echo(choice.place))
        if self.with_prompt_logprobs:
            written["prompt_logprobs"] = [None, *map(self._ranked, choice.events[0].prompt_scores)]
        return written

    def piece(self, place: int, index: int, event: Event, offset: int | None) -> dict[str, Any]:
        """One token of a stream.

        Args:
            place: Of the prompt; index: of the continuation.
            offset: Characters given out before it; None with its first token.
        """
        return self._choice(index, event.text, [event], offset or 0, self._echo(place) if offset is None else None)

    def echoed(self, place: int) -> int:
        """Characters that are given out before a continuation's own."""
        return 0 if self.echoes is None else len(self.echoes[place].text)

    def _echo(self, place: int) -> Echo | None:
        return None if self.echoes is None else self.echoes[place]

    def _choice(
        self, index: int, text: str, events: list[Event], offset: int = 0, echo: Echo | None = None
    ) -> dict[str, Any]:
        finish_reason = events[-1].finish_reason
        logprobs = None if self.logprobs is None else self._logprobs(events, offset, echo)
        text = (echo.text if echo else "") + (text if self.with_answer else "")
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}

    def _logprobs(self, events: list[Event], offset: int, echo: Echo | None) -> dict[str, Any]:
        tokens, values, top, offsets = [], [], [], []
        if echo is not None:
            scores = events[0].prompt_scores
            tokens, offsets, offset = list(echo.tokens), echo.offsets(self.writer), len(echo.text)
            # Nothing comes before the first token.
            values = [None, *(_finite(score.logprob) for score in scores)]
            top = [None, *(self._top_by_text(score.top) for score in scores)]
        for event in events if self.with_answer else []:
            tokens.append(event.token)
            values.append(_finite(event.logprob))
            top.append(self._top_by_text(event.top_logprobs))
            offsets.append(offset)
            offset += len(event.text)
        texts = [self.writer.text(token) for token in tokens]
        return {"tokens": texts, "token_logprobs": values, "top_logprobs": top, "text_offset": offsets}

    def _top_by_text(self, top: dict[int, float]) -> dict[str, float]:
        best = list(top)[: self.logprobs]
        return dict(zip(self.writer.texts(best), (_finite(top[token]) for token in best), strict=True))

    def _ranked(self, score: TokenScore) -> dict[str, Any]:
        """The most probable tokens and the prompt's own, by id, as vLLM gives them."""
        found = {token: (value, rank) for rank, (token, value) in enumerate(score.top.items(), 1)}
        found[score.token] = (score.logprob, score.rank)
        return {
            str(token): {"logprob": _finite(value), "rank": rank, "decoded_token": self.writer.text(token)}
            for token, (value, rank) in found.items()
        }


class ChatStyle(Style):
    """Answers to conversations."""

    object_name = "chat.completion"
    chunk_name = "chat.completion.chunk"
    prefix = "chatcmpl"

    def opening(self, index: int) -> dict[str, Any]:
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def whole(self, choice: Choice) -> dict[str, Any]:
        message = {"role": "assistant", "content": choice.text}
        return {"message": message} | self._rest(choice.index, choice.events)

    def piece(self, place: int, index: int, event: Event, offset: int | None) -> dict[str, Any]:
        return {"delta": {"content": event.text}} | self._rest(index, [event])

    def _rest(self, index: int, events: list[Event]) -> dict[str, Any]:
        content = [self._entry(e.token, e.logprob) | {"top_logprobs": self._top(e)} for e in events]
        logprobs = None if self.logprobs is None else {"content": content}
        return {"index": index, "logprobs": logprobs, "finish_reason": events[-1].finish_reason}

    def _top(self, event: Event) -> list[dict[str, Any]]:
        return [self._entry(token, value) for token, value in event.top_logprobs.items()]

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        raw = self.writer.bytes(token)
        return {"token": self.writer.text(token), "logprob": _finite(logprob), "bytes": list(raw)}


def _finite(logprob: float) -> float:
    """JSON has no infinity: what is impossible gets what OpenAI gives it."""
    return max(logprob, -9999.0)


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """Tokens in and out."""
    total = prompt_tokens + completion_tokens
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": total}


class Fault(BaseModel):
    """What was wrong, as OpenAI's clients read it."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Any answer but a good one."""

    error: Fault


# For the server's OpenAPI document.
ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody, "description": "What is asked cannot be done, or not now (429)"},
    "5XX": {"model": ErrorBody, "description": "The server has failed, or is about to end"},
}


def error_body(
    message: str, kind: str = "invalid_request_error", param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """An error as OpenAI's clients read it."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
