"""What a model answers to the prompts of `ruler`: greedy decoding in batches, and the likelihood of the answer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from photon_train.evaluation.positions import MakeCache
from photon_train.evaluation.ruler import SINGLE, Sample, score

_SEGMENT = 1024  # columns of a prompt that are read at once


@dataclass(frozen=True)
class Answer:
    """What a model wrote.

    Attributes:
        sample: The prompt.
        text: The continuation.
        score: Share of the sample's answers in it.
        nll: Of a single needle: mean negative log-likelihood of its answer's tokens in nats, each after those before
            it; else None. It moves where exact matches do not yet.
    """

    sample: Sample
    text: str
    score: float
    nll: float | None


def answer_samples(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    samples: Sequence[Sample],
    batch_size: int,
    make_cache: MakeCache | None = None,
    on_tokens: Callable[[int], None] | None = None,
) -> Iterator[Answer]:
    """Let `model` answer every prompt, greedily.

    Args:
        model: On its device, in evaluation mode.
        tokenizer: The one that the samples were made with.
        samples: They are answered in batches of one task and length.
        batch_size: Most prompts of a batch; shorter ones are padded on the left.
        make_cache: Makes the cache to read a batch with; None: the model's own.
        on_tokens: Is told the tokens of each batch's prompts.
    """
    groups: dict[tuple[str, int], list[Sample]] = {}
    for sample in samples:
        groups.setdefault((sample.task, sample.length), []).append(sample)
    for group in groups.values():
        for start in range(0, len(group), batch_size):
            batch = group[start : start + batch_size]
            yield from _answer_batch(model, tokenizer, batch, make_cache)
            if on_tokens is not None:
                on_tokens(sum(len(sample.tokens) for sample in batch))


@torch.no_grad()
def _answer_batch(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, samples: list[Sample], make_cache: MakeCache | None
) -> list[Answer]:
    """The prompt is read once: both the answer and its likelihood go on from the cache."""
    device = model.get_input_embeddings().weight.device
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    width = max(len(sample.tokens) for sample in samples)
    tokens = torch.full((len(samples), width), padding)
    mask = torch.zeros_like(tokens)
    for row, sample in enumerate(samples):
        tokens[row, width - len(sample.tokens) :] = torch.tensor(sample.tokens)
        mask[row, width - len(sample.tokens) :] = 1
    tokens, mask = tokens.to(device), mask.to(device)
    cache = _prefill(model, tokens, mask, make_cache)
    nlls: list[float | None] = [None] * len(samples)
    if samples[0].task == SINGLE:
        nlls = _answer_nll(model, tokens, mask, copy.deepcopy(cache), samples)
    written = model.generate(
        input_ids=tokens,
        attention_mask=mask,
        past_key_values=cache,
        max_new_tokens=max(sample.max_new_tokens for sample in samples),
        # The checkpoint's own settings may sample, or punish the repetition that is asked for.
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        pad_token_id=padding,
    )
    texts = tokenizer.batch_decode(written[:, width:], skip_special_tokens=True)
    return [
        Answer(sample, text, score(sample.answers, text), nll)
        for sample, text, nll in zip(samples, texts, nlls, strict=True)
    ]


def _positions(mask: torch.Tensor) -> torch.Tensor:
    """As `generate()` counts them: from every row's first token."""
    return (mask.cumsum(1) - 1).clamp(min=0)


def _prefill(model: PreTrainedModel, tokens: torch.Tensor, mask: torch.Tensor, make_cache: MakeCache | None) -> Any:
    """The cache of all but the last token; no logits are computed."""
    cache = None if make_cache is None else make_cache()
    positions = _positions(mask)
    for start in range(0, tokens.shape[1] - 1, _SEGMENT):
        stop = min(start + _SEGMENT, tokens.shape[1] - 1)
        out = model.base_model(
            input_ids=tokens[:, start:stop],
            attention_mask=mask[:, :stop],
            position_ids=positions[:, start:stop],
            past_key_values=cache,
            use_cache=True,
        )
        cache = out.past_key_values
    return cache


def _answer_nll(
    model: PreTrainedModel, tokens: torch.Tensor, mask: torch.Tensor, cache: Any, samples: list[Sample]
) -> list[float | None]:
    """Mean loss of each sample's answer after its prompt, whose last token the cache does not hold yet."""
    longest = max(len(sample.answer_tokens) for sample in samples)
    answers = torch.zeros(len(samples), longest, dtype=tokens.dtype, device=tokens.device)
    for row, sample in enumerate(samples):
        answers[row, : len(sample.answer_tokens)] = torch.tensor(sample.answer_tokens)
    # What follows a shorter answer is read after it, and changes nothing of it.
    mask = torch.cat([mask, torch.ones_like(answers[:, 1:])], dim=1)
    given = torch.cat([tokens[:, -1:], answers[:, :-1]], dim=1)
    out = model(
        input_ids=given,
        attention_mask=mask,
        position_ids=_positions(mask)[:, -longest:],
        past_key_values=cache,
        use_cache=True,
    )
    losses = F.cross_entropy(out.logits.float().transpose(1, 2), answers, reduction="none").cpu()
    return [losses[row, : len(sample.answer_tokens)].mean().item() for row, sample in enumerate(samples)]
