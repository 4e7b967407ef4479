"""What is asked of the engine and what it answers: sampling settings, one sequence's progress, the result."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from photon_train.errors import PhotonError
from photon_train.inference.blocks import Allocation, SwappedState
from photon_train.inference.streaming import TextStream

# Logits divided by less can overflow, and differences of 1e-3 already decide at this one.
LEAST_TEMPERATURE = 1e-5


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one request are chosen.

    Attributes:
        max_new_tokens: Bound on the new tokens.
        temperature: Divides the logits; 0 (and what is below 1e-5) takes the most probable token.
        top_k: Keep the k most probable tokens; 0 keeps all.
        top_p: Keep the smallest set of tokens whose probability reaches this.
        min_p: Keep tokens at least this share as probable as the best.
        repetition_penalty: Divides positive logits (multiplies negative ones) of tokens that have occurred; 1 is off.
        frequency_penalty: Subtracted from a token's logit for each time that it has been generated, -2 to 2.
        presence_penalty: Subtracted from the logits of tokens that have been generated, -2 to 2.
        logit_bias: Token -> what is added to its logit, -100 to 100; before the penalties.
        stop: Texts or special tokens that end the answer (and are not part of it); they need the engine's tokenizer.
        stop_token_ids: Tokens that end the answer, besides the model's end token.
        ignore_eos: Go on after the model's end token.
        seed: Start of the random numbers; each of the n continuations has its own.
        n: Continuations of the prompt; they share its cache.
        top_logprobs: How many of the most probable tokens to report with every token.
        prompt_logprobs: As many with every token of the prompt, and the log-probability of that token; None reports
            nothing of the prompt. Such a prompt is encoded whole, whatever is kept of its prefixes.

    Raises:
        PhotonError: for a value out of range, naming the attribute.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    seed: int = 0
    n: int = 1
    top_logprobs: int = 0
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        bounds = {
            "max_new_tokens": (1, math.inf),
            "temperature": (0.0, math.inf),
            "top_k": (0, math.inf),
            "min_p": (0.0, 1.0),
            "n": (1, math.inf),
            "top_logprobs": (0, math.inf),
            "prompt_logprobs": (0, math.inf),
            "frequency_penalty": (-2, 2),
            "presence_penalty": (-2, 2),
        }
        for name, (low, high) in bounds.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise PhotonError(f"{name}={value} is not between {low} and {high}")
        for token, bias in self.logit_bias.items():
            if not -100 <= bias <= 100:
                raise PhotonError(f"logit_bias of token {token} is {bias}, which is not between -100 and 100")
        for name in ("top_p", "repetition_penalty"):
            if not 0 < getattr(self, name) < math.inf:
                raise PhotonError(f"{name}={getattr(self, name)} must be positive")
        if self.top_p > 1:
            raise PhotonError(f"top_p={self.top_p} must not exceed 1")
        if not all(self.stop):
            raise PhotonError("stop holds an empty text: it would end every answer at once")

    @property
    def greedy(self) -> bool:
        """Whether no random number is drawn."""
        return self.temperature < LEAST_TEMPERATURE


@dataclass(frozen=True)
class TokenScore:
    """A token that was chosen or given, under the model, before any sampling setting.

    Attributes:
        token: Its id.
        logprob: Its log-probability.
        rank: 1 for the most probable token, 2 for the next; 0 where it was not asked for.
        top: Token -> log-probability of the most probable ones, best first.
    """

    token: int
    logprob: float
    rank: int
    top: dict[int, float]


@dataclass(eq=False)
class Sequence:
    """One continuation on its way.

    Attributes:
        request_id: Number of the request; `index`: which of its n continuations.
        prompt: Token ids of the prompt; `output`: those generated so far.
        logprobs: Log-probability of every output token; `top_logprobs`: the most probable tokens beside it.
        prompt_scores: Of the prompt's tokens from its second on, as far as they have been fed (if asked for).
        keys: Hashes of the prompt's prefixes, see `prefix.prefix_keys`.
        allocation: What it has of the cache while it runs; `saved`: its state while it is swapped out.
        text: Its text, if the engine has a tokenizer.
        finish_reason: `stop`, `length` or `error` once it has ended.
        error: Why, where that is `error`.
    """

    request_id: int
    index: int
    prompt: list[int]
    params: SamplingParams
    keys: list[tuple[int, bytes]]
    text: TextStream | None = None
    output: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[dict[int, float]] = field(default_factory=list)
    prompt_scores: list[TokenScore] = field(default_factory=list)
    allocation: Allocation | None = None
    saved: SwappedState | None = None
    finish_reason: str | None = None
    error: str | None = None

    @property
    def in_prefill(self) -> bool:
        """Whether some of the prompt has not been fed."""
        return self.allocation is not None and self.allocation.length < len(self.prompt)


@dataclass(frozen=True)
class Event:
    """One new token of one sequence, or that it has failed.

    Attributes:
        request_id, index: Whose token it is.
        token: Its id; `logprob`: its log-probability under the model, before any sampling setting. -1 and NaN where
            the sequence has failed.
        text: Text that has become final with it; empty without a tokenizer.
        finish_reason: `stop` or `length` with a sequence's last token, `error` where it has failed, else None.
        top_logprobs: Token -> log-probability of the most probable ones (if asked for).
        error: Why the sequence has failed, in one line.
        prompt_scores: With the first token: those of the prompt's tokens, from its second on (if asked for).
    """

    request_id: int
    index: int
    token: int
    logprob: float
    text: str
    finish_reason: str | None
    top_logprobs: dict[int, float] = field(default_factory=dict)
    error: str | None = None
    prompt_scores: list[TokenScore] = field(default_factory=list)


@dataclass(frozen=True)
class Completion:
    """A finished continuation.

    Attributes:
        index: Which of the n.
        tokens: Generated ids, the end token included.
        logprobs: Log-probability of each under the model, before any sampling setting.
        top_logprobs: Token -> log-probability of the most probable ones at each step (if asked for).
        text: The text up to a stop text; None without a tokenizer.
        finish_reason: `stop`, `length`, or `error`: it has failed, and what is here came before that.
        error: Why, in one line.
        prompt_scores: Of the prompt's tokens, from its second on: nothing comes before the first (if asked for).
    """

    index: int
    tokens: list[int]
    logprobs: list[float]
    top_logprobs: list[dict[int, float]]
    text: str | None
    finish_reason: str
    error: str | None = None
    prompt_scores: list[TokenScore] = field(default_factory=list)

    @property
    def mean_logprob(self) -> float:
        """Mean log-probability per token; -inf where it has failed."""
        return -math.inf if self.error else sum(self.logprobs) / len(self.logprobs)

    @classmethod
    def of(cls, sequence: Sequence) -> Completion:
        """The result of a finished sequence."""
        text = None if sequence.text is None else sequence.text.text
        parts = (sequence.output, sequence.logprobs, sequence.top_logprobs)
        return cls(sequence.index, *parts, text, sequence.finish_reason, sequence.error, sequence.prompt_scores)
