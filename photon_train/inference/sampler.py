"""From logits to tokens, with the settings and the random numbers of each sequence."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from photon_train.inference.request import SamplingParams, Sequence


@dataclass(frozen=True)
class Choice:
    """A chosen token, its log-probability under the model, and the most probable tokens with theirs."""

    token: int
    logprob: float
    top: dict[int, float]


def sample(logits: torch.Tensor, sequences: list[Sequence]) -> list[Choice]:
    """Choose a token for each sequence.

    The result for a sequence depends on its own logits, settings and random numbers only, not on its neighbours.

    Args:
        logits: ``[n, V]``.
        sequences: Whose tokens they are, n.
    """
    logits = logits.float()
    logprobs = logits.log_softmax(dim=-1)
    tokens = torch.empty(len(sequences), dtype=torch.long)
    plain = [i for i, s in enumerate(sequences) if s.params.greedy and s.params.repetition_penalty == 1]
    if plain:
        tokens[plain] = logits[plain].argmax(dim=-1).cpu()
    for index in sorted(set(range(len(sequences))) - set(plain)):
        tokens[index] = _choose(logits[index], sequences[index])
    chosen = logprobs.gather(1, tokens[:, None].to(logprobs.device))[:, 0].tolist()
    return [
        Choice(token, logprob, _top(logprobs[index], sequences[index].params.top_logprobs))
        for index, (token, logprob) in enumerate(zip(tokens.tolist(), chosen, strict=True))
    ]


def _choose(logits: torch.Tensor, sequence: Sequence) -> int:
    params = sequence.params
    if params.repetition_penalty != 1:
        logits = penalise(logits, sorted({*sequence.prompt, *sequence.output}), params.repetition_penalty)
    if params.greedy:
        return int(logits.argmax())
    probabilities = warp(logits, params).softmax(dim=-1).cpu()
    # The largest p / e with exponential e is a draw from p: one number per token, whatever the other settings are.
    noise = torch.empty_like(probabilities).exponential_(generator=sequence.generator)
    return int((probabilities / noise).argmax())


def penalise(logits: torch.Tensor, occurred: list[int], penalty: float) -> torch.Tensor:
    """Make tokens that have occurred less likely (CTRL, arXiv 1909.05858): ``logits [V]``."""
    index = torch.tensor(occurred, device=logits.device)
    seen = logits[index]
    return logits.index_copy(0, index, torch.where(seen < 0, seen * penalty, seen / penalty))


def warp(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Temperature, then top-k, top-p and min-p, in transformers' order; what is excluded becomes -inf. ``[V]``."""
    logits = logits / params.temperature
    if 0 < params.top_k < logits.numel():
        logits = logits.masked_fill(logits < logits.topk(params.top_k).values[-1], -torch.inf)
    if params.top_p < 1:
        ranked, order = logits.sort(descending=True)
        probabilities = ranked.softmax(dim=-1)
        # A token stays while those before it have not reached top_p: the best one always does.
        excluded = probabilities.cumsum(dim=-1) - probabilities >= params.top_p
        logits = logits.masked_fill(torch.zeros_like(excluded).scatter(0, order, excluded), -torch.inf)
    if params.min_p > 0:
        probabilities = logits.softmax(dim=-1)
        logits = logits.masked_fill(probabilities < params.min_p * probabilities.max(), -torch.inf)
    return logits


def _top(logprobs: torch.Tensor, count: int) -> dict[int, float]:
    if not count:
        return {}
    best = logprobs.topk(min(count, logprobs.numel()))
    return dict(zip(best.indices.tolist(), best.values.tolist(), strict=True))
