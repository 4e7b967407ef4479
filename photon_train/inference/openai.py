"""OpenAI's completions and chat completions: requests as they come, answers as they are expected.

What a request asks and the engine cannot do is refused, never ignored: unknown fields are errors.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from transformers import PreTrainedTokenizerBase

from photon_train.errors import PhotonError
from photon_train.inference.refusals import without_neutral
from photon_train.inference.request import Event, SamplingParams
from photon_train.inference.tokens import TokenWriter


def _unicode(text: str) -> str:
    """JSON can write half of a surrogate pair, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the character at {error.start} is half of a surrogate pair, which is no text") from error
    return text


Text = Annotated[str, AfterValidator(_unicode)]


def without_nulls(given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that have a value."""
    return {key: value for key, value in given.items() if value is not None}


class _Part(BaseModel):
    """A request or an object in it: null is the same as absent, and what is unknown is refused."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, given: Any) -> Any:
        return without_nulls(given) if isinstance(given, dict) else given


class StreamOptions(_Part):
    """Whether a last chunk states the tokens used."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class _Request(_Part):
    """What both kinds of request share; below the line, settings beyond OpenAI's."""

    model: str | None = None
    n: int = Field(1, ge=1, le=1024)
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None

    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop_token_ids: list[int] = []
    ignore_eos: bool = False

    @model_validator(mode="before")
    @classmethod
    def _without_neutral(cls, given: Any) -> Any:
        return without_neutral(without_nulls(given)) if isinstance(given, dict) else given

    def sampling(self, max_new_tokens: int, n: int, top_logprobs: int, defaults: Mapping[str, Any]) -> SamplingParams:
        """The engine's settings; `defaults` are the model's, for those that are not given.

        Raises:
            PhotonError: for a value out of range.
        """
        given = {name: getattr(self, name) for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")}
        given["top_k"] = 0 if self.top_k == -1 else self.top_k  # vLLM's clients write all tokens so
        given["stop"] = None if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        chosen = {"temperature": 1.0, **defaults, **{key: value for key, value in given.items() if value is not None}}
        return SamplingParams(
            max_new_tokens=max_new_tokens,
            stop_token_ids=tuple(self.stop_token_ids),
            ignore_eos=self.ignore_eos,
            seed=secrets.randbits(31) if self.seed is None else self.seed,
            n=n,
            top_logprobs=top_logprobs,
            **chosen,
        )


class CompletionRequest(_Request):
    """POST /v1/completions."""

    prompt: Text | list[Text] | list[int] | list[list[int]]
    max_tokens: int = Field(16, ge=1)
    logprobs: int | None = Field(None, ge=0, le=20)
    best_of: int | None = Field(None, ge=1, le=1024)

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each prompt, as text or tokens."""
        single = isinstance(self.prompt, str) or not self.prompt or isinstance(self.prompt[0], int)
        return [self.prompt] if single else list(self.prompt)


class TextPart(_Part):
    """A piece of a message."""

    type: Literal["text"]
    text: Text


class Message(_Part):
    """One turn of a conversation."""

    role: str
    content: Text | list[TextPart]
    name: Text | None = None

    def plain(self) -> dict[str, str]:
        """As chat templates take it."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        name = {} if self.name is None else {"name": self.name}
        return {"role": self.role, "content": content} | name


class ChatRequest(_Request):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)

    def tokens(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """The conversation by the tokenizer's chat template, up to where the answer begins.

        Raises:
            PhotonError: if the tokenizer has no template, or the template refuses the conversation.
        """
        if tokenizer.chat_template is None:
            raise PhotonError("the tokenizer has no chat template: use /v1/completions")
        try:
            text = tokenizer.apply_chat_template(
                [message.plain() for message in self.messages], tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # templates raise what they like
            raise PhotonError(f"the chat template refuses the messages: {error}") from error
        return tokenizer(text, add_special_tokens=False)["input_ids"]


@dataclass
class Choice:
    """One continuation as it comes.

    Attributes:
        index: Its number in the answer.
        events: Its tokens.
    """

    index: int
    events: list[Event] = field(default_factory=list)

    @property
    def text(self) -> str:
        """What has become final."""
        return "".join(event.text for event in self.events)

    @property
    def mean_logprob(self) -> float:
        """Mean log-probability per token."""
        return sum(event.logprob for event in self.events) / len(self.events)


class Style:
    """How answers of one kind look.

    Args:
        writer: Writes tokens of log-probabilities.
        with_logprobs: Whether they are asked for.
    """

    object_name = "text_completion"
    chunk_name = "text_completion"
    prefix = "cmpl"

    def __init__(self, writer: TokenWriter, with_logprobs: bool) -> None:
        self.writer, self.with_logprobs = writer, with_logprobs

    def opening(self, index: int) -> dict[str, Any] | None:
        """A chunk before the first token, or None."""
        return None

    def whole(self, choice: Choice) -> dict[str, Any]:
        """A finished continuation."""
        return self._choice(choice.index, choice.text, choice.events)

    def piece(self, index: int, event: Event, offset: int) -> dict[str, Any]:
        """One token of a stream; `offset`: characters given out before it."""
        return self._choice(index, event.text, [event], offset)

    def _choice(self, index: int, text: str, events: list[Event], offset: int = 0) -> dict[str, Any]:
        logprobs = self._logprobs(events, offset) if self.with_logprobs else None
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": events[-1].finish_reason}

    def _logprobs(self, events: list[Event], offset: int) -> dict[str, Any]:
        offsets = []
        for event in events:
            offsets.append(offset)
            offset += len(event.text)
        return {
            "tokens": [self.writer.text(event.token) for event in events],
            "token_logprobs": [_finite(event.logprob) for event in events],
            "top_logprobs": [self._top_by_text(event) for event in events],
            "text_offset": offsets,
        }

    def _top_by_text(self, event: Event) -> dict[str, float]:
        texts = self.writer.texts(list(event.top_logprobs))
        return dict(zip(texts, map(_finite, event.top_logprobs.values()), strict=True))


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

    def piece(self, index: int, event: Event, offset: int) -> dict[str, Any]:
        return {"delta": {"content": event.text}} | self._rest(index, [event])

    def _rest(self, index: int, events: list[Event]) -> dict[str, Any]:
        content = [self._entry(e.token, e.logprob) | {"top_logprobs": self._top(e)} for e in events]
        logprobs = {"content": content} if self.with_logprobs else None
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


def error_body(
    message: str, kind: str = "invalid_request_error", param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """An error as OpenAI's clients read it."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
