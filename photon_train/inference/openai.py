"""Requests of OpenAI's completions and chat completions as they come.

What a request asks and the engine cannot do is refused, never ignored: unknown fields are errors.
"""

from __future__ import annotations

import inspect
import re
import secrets
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictInt, model_validator
from transformers import PreTrainedTokenizerBase

from photon_train.errors import PhotonError
from photon_train.inference.refusals import without_neutral
from photon_train.inference.request import SamplingParams

# What is no variable of a template, whatever it is called there.
_TEMPLATE_SETTINGS = {*inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters, "messages"}


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
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None

    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop_token_ids: list[StrictInt] = []
    ignore_eos: bool = False

    @model_validator(mode="before")
    @classmethod
    def _without_neutral(cls, given: Any) -> Any:
        return without_neutral(without_nulls(given)) if isinstance(given, dict) else given

    def sampling(
        self,
        max_new_tokens: int,
        n: int,
        top_logprobs: int,
        defaults: Mapping[str, Any],
        prompt_logprobs: int | None = None,
    ) -> SamplingParams:
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
            prompt_logprobs=prompt_logprobs,
            frequency_penalty=self.frequency_penalty,
            presence_penalty=self.presence_penalty,
            logit_bias=self.logit_bias,
            **chosen,
        )


class CompletionRequest(_Request):
    """POST /v1/completions."""

    prompt: Text | list[Text] | list[StrictInt] | list[list[StrictInt]]
    max_tokens: int = Field(16, ge=0)
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool = False
    prompt_logprobs: int | None = Field(None, ge=0, le=20)
    best_of: int | None = Field(None, ge=1, le=1024)

    @model_validator(mode="after")
    def _check_parts(self) -> CompletionRequest:
        if not self.max_tokens and not self.echo:
            raise PhotonError("max_tokens: 0 asks for nothing: give at least 1, or echo=true")
        if self.stream and self.prompt_logprobs is not None:
            raise PhotonError("prompt_logprobs: they are not streamed: leave stream out, or use echo with logprobs")
        return self

    @property
    def scored(self) -> int | None:
        """How many of the most probable tokens are wanted beside each of the prompt's; None: nothing of the prompt."""
        wanted = [self.prompt_logprobs, self.logprobs if self.echo else None]
        return max((count for count in wanted if count is not None), default=None)

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
    chat_template_kwargs: dict[str, Any] = {}

    def tokens(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """The conversation by the tokenizer's chat template, up to where the answer begins.

        Raises:
            PhotonError: if the tokenizer has no template, the template refuses the conversation, or has no variable
                of `chat_template_kwargs`.
        """
        if tokenizer.chat_template is None:
            raise PhotonError("the tokenizer has no chat template: use /v1/completions")
        template = tokenizer.get_chat_template()
        for name in self.chat_template_kwargs:
            if name in _TEMPLATE_SETTINGS or not re.search(rf"\b{re.escape(name)}\b", template):
                raise PhotonError(f"chat_template_kwargs: {name!r} is no variable of the model's chat template")
        messages, variables = [message.plain() for message in self.messages], self.chat_template_kwargs
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **variables)
        except Exception as error:  # templates raise what they like
            raise PhotonError(f"the chat template refuses the messages: {error}") from error
        return tokenizer(text, add_special_tokens=False)["input_ids"]
