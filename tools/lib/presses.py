"""Presses of kvpress, and the retrieval of a dense model whose cache one has compressed."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from photon_train.errors import PhotonError
from photon_train.evaluation.long import LongInputs, retrieval_columns
from photon_train.evaluation.retrieval import Answer
from photon_train.evaluation.ruler import SINGLE, Sample, score

# Last tokens of a prompt, which hold the question: they are read after the compression, for a cache that many questions
# share cannot know them, and stay whole.
QUESTION = 128
# Presses that read attention weights.
_EAGER = ("ObservedAttentionPress",)
Press = Callable[[PreTrainedModel], AbstractContextManager]


def press_for(model: PreTrainedModel, name: str, compression_ratio: float) -> Press:
    """A press of kvpress, and `model` with the attention that it reads.

    Args:
        name: A press that takes `compression_ratio`, the share of a cache that it drops.

    Raises:
        PhotonError: if kvpress is not installed, or has no such press.
    """
    try:
        import kvpress
    except ImportError as error:
        raise PhotonError(
            f"kvpress cannot be imported ({error}): pip install --no-deps kvpress cachetools fire termcolor"
        ) from error
    if not hasattr(kvpress, name):
        raise PhotonError(f"kvpress has no {name}")
    model.set_attn_implementation("eager" if name in _EAGER else "sdpa")
    return getattr(kvpress, name)(compression_ratio=compression_ratio)


def evaluate_pressed(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    inputs: LongInputs,
    name: str,
    cache_percent: Callable[[int], float],
) -> Iterator[dict[str, Any]]:
    """As `evaluate_long`, without cross-entropies: a press compresses a prompt once, and text has no such moment.

    Args:
        model: The dense model, on its device.
        name: A press of kvpress that takes `compression_ratio`.
        cache_percent: Length -> percent of the dense model's cache that may be kept of a prompt, its question included.

    Raises:
        PhotonError: as `press_for`, or if nothing is left for what precedes a question.
    """
    model.eval()
    for length in inputs.settings.lengths:
        start, answers = time.perf_counter(), []
        kept = cache_percent(length) / 100 * length - QUESTION
        if kept < 1:
            raise PhotonError(f"{name}: a cache of {kept + QUESTION:.0f} tokens holds no more than the question")
        for sample in inputs.samples[length]:
            ratio = max(0.0, 1 - kept / (len(sample.tokens) - QUESTION))
            answers.append(_answer(model, tokenizer, sample, press_for(model, name, ratio)))
        yield {
            "length": length,
            "tokens": sum(len(sample.tokens) for sample in inputs.samples[length]),
            "ce": None,
            "ce_beyond_window": None,
            "ce_by_position": {},
            **retrieval_columns(answers),
            "seconds": round(time.perf_counter() - start, 1),
        }


@torch.no_grad()
def _answer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sample: Sample, press: Press) -> Answer:
    """The greedy answer, and its likelihood."""
    tokens = torch.tensor(sample.tokens, device=model.device)[None]
    read = tokens.shape[1] - QUESTION
    cache, position = DynamicCache(config=model.config), torch.arange(tokens.shape[1], device=model.device)[None]
    with press(model):
        model.base_model(
            input_ids=tokens[:, :read],
            position_ids=position[:, :read],
            cache_position=position[0, :read],
            past_key_values=cache,
            use_cache=True,
        )

    def following(given: torch.Tensor, first: int, onto: DynamicCache) -> torch.Tensor:
        """Logits after each token of ``given [T]``, the first of which has position `first`."""
        at = first + torch.arange(len(given), device=given.device)
        out = model(input_ids=given[None], position_ids=at[None], past_key_values=onto, use_cache=True)
        return out.logits[0].float()

    logits, nll = following(tokens[0, read:], read, cache)[-1:], None
    if sample.task == SINGLE:
        answer = torch.tensor(sample.answer_tokens, device=model.device)
        later = following(answer[:-1], tokens.shape[1], copy.deepcopy(cache)) if len(answer) > 1 else logits[:0]
        nll = F.cross_entropy(torch.cat([logits, later]), answer).item()
    written: list[int] = []
    ends = model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends])
    for step in range(sample.max_new_tokens):
        written.append(int(logits[-1].argmax()))
        if written[-1] in ends:
            break
        logits = following(torch.tensor(written[-1:], device=model.device), tokens.shape[1] + step, cache)
    text = tokenizer.decode(written, skip_special_tokens=True)
    return Answer(sample, text, score(sample.answers, text), nll)
