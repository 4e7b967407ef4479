"""Continuous batching of requests on a PHOTON model.

    engine = Engine(model, tokenizer, EngineSettings(memory="4GiB"))
    for answers in engine.generate(["Once upon a time", "def main"], SamplingParams(max_new_tokens=64)):
        print(answers[0].text)

Every sequence gets the tokens it would get alone, whatever its neighbours are.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import count

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from photon_train.errors import PhotonError
from photon_train.inference.cache import PagedCache
from photon_train.inference.defaults import sampling_defaults
from photon_train.inference.graphs import StaticCalls
from photon_train.inference.prefix import PrefixCache, prefix_keys
from photon_train.inference.request import Completion, Event, SamplingParams, Sequence, TokenScore
from photon_train.inference.runner import Runner
from photon_train.inference.sampler import sample, score
from photon_train.inference.scheduler import Scheduler
from photon_train.inference.settings import EngineSettings, plan_cache
from photon_train.inference.streaming import TextStream
from photon_train.inference.tokens import prompt_tokens

logger = logging.getLogger(__name__)

Prompt = str | list[int]


class Engine:
    """Requests in, tokens out.

    Args:
        model: In evaluation mode, on its device, with its backend chosen.
        tokenizer: For prompts and answers as text, and for stop texts; without it, prompts are token ids.

    Attributes:
        defaults: Settings of `SamplingParams` for who gives none, from the model's generation config.

    Raises:
        PhotonError: if the memory is too small for the settings, the model's protocol is not `hiergen`, or its
            generation config has a value out of range.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        settings: EngineSettings | None = None,
    ) -> None:
        settings = settings or EngineSettings()
        protocol = getattr(model, "protocol", "hiergen")
        if protocol != "hiergen":
            raise PhotonError(f"the engine serves hiergen, not {protocol}: use generate(), or set_protocol")
        if getattr(model.config, "recurrent_layers", None):
            raise PhotonError(
                f"the engine pages keys, values and latents, not the states of a hybrid ({model.config.base_model_type}"
                "): use generate()"
            )
        self.model, self.tokenizer, self.settings = model, tokenizer, settings
        self.defaults = sampling_defaults(model.generation_config, settings.generation_config, tokenizer is not None)
        self.cache = PagedCache(model, plan_cache(model, settings))
        self.prefixes = PrefixCache(self.cache, settings.max_prefixes)
        self.segment_tokens = settings.segment_tokens
        self.scheduler = Scheduler(
            self.cache,
            self.prefixes,
            settings.max_sequences,
            self.segment_tokens,
            settings.step_tokens,
        )
        graphs = settings.cuda_graphs == "auto" and model.device.type == "cuda"
        self.runner = Runner(model, self.cache, self.static_calls(capture=True) if graphs else None)
        self._numbers = count()
        self._in_step: list[Sequence] | None = []  # whom the model runs for; None while that is chosen
        self._open: dict[int, list[Sequence]] = {}
        self._done: dict[int, list[Completion]] = {}
        ends = model.generation_config.eos_token_id
        self._ends = set(ends if isinstance(ends, list) else [] if ends is None else [ends])

    def static_calls(self, capture: bool) -> StaticCalls:
        """Decoding at fixed shapes for this engine's sizes."""
        layout = self.cache.layout
        longest = layout.blocks_for(self.settings.max_length or self.model.config.max_position_embeddings)
        return StaticCalls(self.cache, self.settings.max_sequences, min(longest, layout.num_blocks), capture)

    # --- requests ---

    def add(self, prompt: Prompt, params: SamplingParams | None = None) -> int:
        """Queue a request, by default with the settings `defaults`; returns its number.

        Raises:
            PhotonError: for an empty prompt, a text without a tokenizer, a request longer than the memory, a stop
                text that can never appear, or a bias of a token that there is not.
        """
        params = params or SamplingParams(**self.defaults)
        self._check_known(params.logit_bias, "logit_bias: ")
        tokens = self.tokens(prompt)
        if len(tokens) + params.max_new_tokens > self.longest:
            raise PhotonError(
                f"the prompt of {len(tokens)} tokens and up to {params.max_new_tokens} new ones exceed "
                f"the {self.longest} tokens that memory and the model's positions hold: raise memory, or ask for less"
            )
        if params.stop and self.tokenizer is None:
            raise PhotonError("stop needs a tokenizer: give the engine one, or use stop_token_ids")
        texts = [self.tokenizer and TextStream(self.tokenizer, tokens, params.stop) for _ in range(params.n)]
        number, keys = next(self._numbers), prefix_keys(tokens, self.segment_tokens)
        self._open[number] = []
        for index, text in enumerate(texts):
            sequence = Sequence(number, index, tokens, params, keys, text)
            self._open[number].append(sequence)
            self.scheduler.add(sequence)
        return number

    def tokens(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt.

        Raises:
            PhotonError: for an empty prompt, a text without a tokenizer, or a token that there is not.
        """
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise PhotonError("a prompt as text needs a tokenizer: give the engine one, or pass token ids")
            prompt = prompt_tokens(self.tokenizer, prompt)
        tokens = [int(token) for token in prompt]
        if not tokens:
            raise PhotonError("a prompt is empty: give at least one token of text")
        self._check_known(tokens)
        return tokens

    def _check_known(self, tokens: Iterable[int], place: str = "") -> None:
        outside = [token for token in tokens if not 0 <= token < self.model.config.vocab_size]
        if outside:
            raise PhotonError(f"{place}token {outside[0]} is outside the vocabulary of {self.model.config.vocab_size}")

    def abort(self, number: int) -> None:
        """Drop a request, wherever it is; unknown numbers are ignored."""
        for sequence in self._open.pop(number, []):
            self.scheduler.remove(sequence)
        self._done.pop(number, None)

    def result(self, number: int) -> list[Completion] | None:
        """The n continuations of a finished request, once; None while it runs."""
        return self._done.pop(number, None)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence: what memory holds of one alone, within the model's longest position."""
        layout = self.cache.layout
        return min(layout.num_blocks * layout.block_size, self.model.config.max_position_embeddings)

    def is_open(self, number: int) -> bool:
        """Whether a request is unfinished, and neither aborted nor dropped."""
        return number in self._open

    @property
    def has_work(self) -> bool:
        """Whether a request is unfinished."""
        return bool(self._open)

    def generate(
        self, prompts: Iterable[Prompt], params: SamplingParams | list[SamplingParams] | None = None
    ) -> list[list[Completion]]:
        """Answer all prompts; per prompt its n continuations, of which one that has failed says so (`error`).

        Raises:
            PhotonError: as `add`.

        Whatever interrupts it, none of the prompts is left in the engine.
        """
        numbers = self._add_all(prompts, params)
        try:
            while any(number in self._open for number in numbers):
                self.step()
        except BaseException:
            for number in numbers:
                self.abort(number)
            raise
        return [self.result(number) for number in numbers]

    def stream(
        self, prompts: Iterable[Prompt], params: SamplingParams | list[SamplingParams] | None = None
    ) -> Iterator[Event]:
        """The tokens of all prompts as they come; a request's number is its prompt's index, from 0.

        Ending the iteration early drops what is unfinished.
        """
        numbers = self._add_all(prompts, params)
        place = {number: index for index, number in enumerate(numbers)}
        try:
            while any(number in self._open for number in numbers):
                for event in self.step():
                    if event.request_id in place:
                        yield Event(**{**vars(event), "request_id": place[event.request_id]})
        finally:
            for number in numbers:
                self.abort(number)

    def _add_all(self, prompts, params) -> list[int]:
        prompts = list(prompts)
        each = params if isinstance(params, list) else [params] * len(prompts)
        if len(each) != len(prompts):
            raise PhotonError(f"{len(prompts)} prompts have {len(each)} sampling settings: give one, or one per prompt")
        numbers = []
        try:
            for prompt, settings in zip(prompts, each, strict=True):
                numbers.append(self.add(prompt, settings))
        except PhotonError:
            for number in numbers:
                self.abort(number)
            raise
        return numbers

    # --- a step ---

    def step(self) -> list[Event]:
        """Prefill a bounded number of tokens, decode one token of every running sequence.

        Whatever interrupts it, an error out of memory for example: its requests are dropped, the others can go on.
        """
        try:
            return self._compute()
        except BaseException:
            self._recover()
            raise
        finally:
            self._in_step = []

    def _compute(self) -> list[Event]:
        self._in_step = None
        plan = self.scheduler.plan()
        self._in_step = [*(one for one, _ in (*plan.ready, *plan.prefill)), *plan.decode]
        sequences, logits = [], []
        for sequence, known in plan.ready:
            sequences.append(sequence)
            logits.append(known[None])
        if plan.decode:
            work = [(sequence.allocation, sequence.output[-1]) for sequence in plan.decode]
            sequences += plan.decode
            logits.append(self.runner.decode(work))
        for sequence, row in self._prefill(plan.prefill):
            sequences.append(sequence)
            logits.append(row[None])
        if not sequences:
            return []
        choices = sample(torch.cat([part.float() for part in logits]), sequences)
        return [self._advance(sequence, choice) for sequence, choice in zip(sequences, choices, strict=True)]

    def _recover(self) -> None:
        """Drop the requests of an interrupted step: nobody knows how far it has come.

        Kept prefixes go as well, and memory is given back by what is left.
        """
        running, waiting = self.scheduler.running, self.scheduler.waiting
        hit = running if self._in_step is None else self._in_step
        # A sequence in neither list was on its way between them.
        lost = [
            number
            for number, sequences in self._open.items()
            if any(
                one in hit or (one.finish_reason is None and one not in running and one not in waiting)
                for one in sequences
            )
        ]
        for number in lost:
            self.abort(number)
        self.prefixes.clear()
        self.cache.keep_only([one.allocation for one in self.scheduler.running])
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()

    def _prefill(self, work: list[tuple[Sequence, int]]) -> list[tuple[Sequence, torch.Tensor]]:
        """Feed prompts; those that are through, with the logits of their first token."""
        if not work:
            return []
        segments = [(s.allocation, s.prompt[s.allocation.length : s.allocation.length + number]) for s, number in work]
        scored = {
            index: partial(self._score_prompt, sequence, sequence.allocation.length)
            for index, (sequence, _) in enumerate(work)
            if sequence.params.prompt_logprobs is not None
        }
        logits, through = self.runner.prefill(segments, scored), []
        for (sequence, _), row in zip(work, logits, strict=True):
            key = dict(sequence.keys)[sequence.allocation.length]
            if sequence.in_prefill:
                self.prefixes.keep(key, sequence.allocation)
            else:
                self.prefixes.keep(key, sequence.allocation, row)
                through.append((sequence, row))
        return through

    @staticmethod
    def _score_prompt(sequence: Sequence, start: int, logits: torch.Tensor) -> None:
        """Score the tokens that follow those from `start` on, whose logits ``[n, V]`` are."""
        following = sequence.prompt[start + 1 : start + 1 + len(logits)]
        sequence.prompt_scores += score(logits[: len(following)], following, sequence.params.prompt_logprobs)

    def _advance(self, sequence: Sequence, choice: TokenScore) -> Event:
        first = not sequence.output
        # A NaN or an infinity among the logits makes every log-probability NaN: the chosen one tells.
        if not math.isfinite(choice.logprob) or (first and any(math.isnan(s.logprob) for s in sequence.prompt_scores)):
            return self._fail(sequence, "the model's logits are not finite: it overflows in this dtype")
        sequence.output.append(choice.token)
        sequence.logprobs.append(choice.logprob)
        sequence.top_logprobs.append(choice.top)
        stopped = self._is_end(sequence, choice.token)
        text = ""
        if sequence.text is not None:
            stopped = sequence.text.push(choice.token) or stopped
        if stopped or len(sequence.output) >= sequence.params.max_new_tokens:
            sequence.finish_reason = "stop" if stopped else "length"
        if sequence.text is not None:
            text = sequence.text.take(sequence.finish_reason is not None)
        if sequence.finish_reason is not None:
            self._finish(sequence)
        return Event(
            sequence.request_id,
            sequence.index,
            choice.token,
            choice.logprob,
            text,
            sequence.finish_reason,
            choice.top,
            prompt_scores=sequence.prompt_scores if first else [],
        )

    def _fail(self, sequence: Sequence, why: str) -> Event:
        logger.error("request %d has failed: %s", sequence.request_id, why)
        sequence.finish_reason, sequence.error = "error", why
        self.prefixes.forget(sequence.keys)
        self._finish(sequence)
        return Event(sequence.request_id, sequence.index, -1, math.nan, "", "error", error=why)

    def _is_end(self, sequence: Sequence, token: int) -> bool:
        if token in sequence.params.stop_token_ids:
            return True
        return not sequence.params.ignore_eos and token in self._ends

    def _finish(self, sequence: Sequence) -> None:
        self.scheduler.remove(sequence)
        siblings = self._open[sequence.request_id]
        if all(one.finish_reason is not None for one in siblings):
            self._done[sequence.request_id] = [Completion.of(one) for one in siblings]
            del self._open[sequence.request_id]
