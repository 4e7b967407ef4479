"""From logits to tokens, all rows at once on their device, with the settings and random numbers of each sequence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from collections.abc import Sequence as Listed

import torch

from photon_train.inference.request import SamplingParams, Sequence, TokenScore

_WORD = 2**64
# SplitMix64 (Steele, Lea and Flood 2014): the step of its counter and the multipliers of its mixing function.
_STEP, _MULTIPLIERS = 0x9E3779B97F4A7C15, (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_SHIFTS = (30, 27, 31)


SCORED_AT_ONCE = 2**24  # logits whose log-probabilities are held in float32 at a time: 64 MiB


def sample(logits: torch.Tensor, sequences: list[Sequence]) -> list[TokenScore]:
    """Choose a token for each sequence.

    The result for a sequence depends on its own logits, settings, seed and number of tokens only: not on its
    neighbours, nor on whether it was preempted.

    Args:
        logits: ``[n, V]``.
        sequences: Whose tokens they are, n.
    """
    logits = logits.float()
    logprobs = logits.log_softmax(dim=-1)
    biased = [one.params.logit_bias for one in sequences]
    penalised = [index for index, one in enumerate(sequences) if one.params.repetition_penalty != 1]
    if any(biased):
        logits = add(logits, biased)
    drawn = [index for index, one in enumerate(sequences) if not one.params.greedy]
    if penalised:
        logits = logits.index_copy(0, _index(penalised, logits), _penalised(logits, sequences, penalised))
    repeated = [_repeated(one) for one in sequences]
    if any(repeated):
        logits = add(logits, repeated)
    if drawn:
        rows, chosen = _index(drawn, logits), [sequences[index] for index in drawn]
        warped = warp(logits[rows], [one.params for one in chosen])
        logits = logits.index_copy(0, rows, warped + gumbel([stream_key(one) for one in chosen], warped))
    tokens = logits.argmax(dim=-1)
    chosen = logprobs.gather(1, tokens[:, None])[:, 0].tolist()
    top = _top(logprobs, [one.params.top_logprobs for one in sequences])
    return [TokenScore(token, value, 0, best) for token, value, best in zip(tokens.tolist(), chosen, top, strict=True)]


def score(logits: torch.Tensor, tokens: list[int], count: int) -> list[TokenScore]:
    """Given tokens under the model.

    Args:
        logits: ``[n, V]``; tokens: one for each of them.
        count: How many of the most probable tokens to report beside each.
    """
    found = []
    for start in range(0, len(tokens), size := max(1, SCORED_AT_ONCE // logits.shape[1])):
        logprobs = logits[start : start + size].float().log_softmax(dim=-1)
        given = tokens[start : start + size]
        own = logprobs.gather(1, _index(given, logits)[:, None])
        ranks = 1 + (logprobs > own).sum(dim=-1)
        top = _top(logprobs, [count] * len(given))
        found += map(TokenScore, given, own[:, 0].tolist(), ranks.tolist(), top)
    return found


def _index(rows: list[int], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(rows, device=like.device)


def _penalised(logits: torch.Tensor, sequences: list[Sequence], rows: list[int]) -> torch.Tensor:
    chosen = [sequences[index] for index in rows]
    occurred = [sorted({*one.prompt, *one.output}) for one in chosen]
    return penalise(logits[_index(rows, logits)], occurred, [one.params.repetition_penalty for one in chosen])


def penalise(logits: torch.Tensor, occurred: Listed[Listed[int]], penalties: Listed[float]) -> torch.Tensor:
    """Make tokens that have occurred less likely (CTRL, arXiv 1909.05858).

    Args:
        logits: ``[m, V]``.
        occurred: Per row, the ids of such tokens; penalties: per row, the factor.
    """
    row = torch.tensor([index for index, ids in enumerate(occurred) for _ in ids], device=logits.device)
    token = torch.tensor([token for ids in occurred for token in ids], device=logits.device)
    penalty = torch.tensor(penalties, device=logits.device)[row]
    seen = logits[row, token]
    return logits.index_put((row, token), torch.where(seen < 0, seen * penalty, seen / penalty))


def add(logits: torch.Tensor, amounts: Listed[Mapping[int, float]]) -> torch.Tensor:
    """Add to single logits.

    Args:
        logits: ``[n, V]``.
        amounts: Per row, token -> what is added.
    """
    row = torch.tensor([index for index, each in enumerate(amounts) for _ in each], device=logits.device)
    token = torch.tensor([token for each in amounts for token in each], device=logits.device)
    amount = torch.tensor([float(value) for each in amounts for value in each.values()], device=logits.device)
    return logits.index_put((row, token), amount, accumulate=True)


def _repeated(sequence: Sequence) -> dict[int, float]:
    """What is added to the logits of generated tokens."""
    frequency, presence = sequence.params.frequency_penalty, sequence.params.presence_penalty
    if not frequency and not presence:
        return {}
    return {token: -frequency * times - presence for token, times in Counter(sequence.output).items()}


def warp(logits: torch.Tensor, params: Listed[SamplingParams]) -> torch.Tensor:
    """Temperature, then top-k, top-p and min-p, in transformers' order; what is excluded becomes -inf.

    Args:
        logits: ``[m, V]``; params: of each row, none greedy.
    """
    size = logits.shape[1]

    def column(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, device=logits.device)[:, None]

    logits = logits / column([one.temperature for one in params])
    by_count, by_mass = (any(0 < one.top_k < size for one in params), any(one.top_p < 1 for one in params))
    if by_count or by_mass:
        ranked, order = logits.sort(dim=-1, descending=True)
        if by_count:
            last = column([min(one.top_k, size) - 1 if one.top_k else size - 1 for one in params])
            excluded = ranked < ranked.gather(1, last)  # whatever equals the last stays
            ranked = ranked.masked_fill(excluded, -torch.inf)
        if by_mass:
            probabilities = ranked.softmax(dim=-1)
            # A token stays while those before it have not reached top_p: the best one always does.
            limit = column([one.top_p if one.top_p < 1 else torch.inf for one in params])
            ranked = ranked.masked_fill(probabilities.cumsum(dim=-1) - probabilities >= limit, -torch.inf)
        logits = torch.empty_like(logits).scatter(1, order, ranked)
    if any(one.min_p > 0 for one in params):
        least = column([one.min_p for one in params]).log() + logits.amax(dim=-1, keepdim=True)
        logits = logits.masked_fill(logits < least, -torch.inf)
    return logits


def stream_key(sequence: Sequence) -> int:
    """Start of the random numbers for a sequence's next token: of its seed, continuation and number of tokens."""
    # Two requests with neighbouring seeds share no continuation's stream.
    seed = (sequence.params.seed * 1_000_003 + sequence.index) % _WORD
    return _mix((_mix(seed) + len(sequence.output) * _STEP) % _WORD)


def _mix(word: int) -> int:
    """SplitMix64's mixing function."""
    for shift, factor in zip(_SHIFTS, (*_MULTIPLIERS, 1), strict=True):
        word = (word ^ word >> shift) * factor % _WORD
    return word


def gumbel(keys: Listed[int], like: torch.Tensor) -> torch.Tensor:
    """Gumbel noise ``[m, V]``: the largest of logits plus noise is a draw from their softmax.

    Token v of a row takes the number that SplitMix64 gives after v steps from the row's key, so that rows are drawn
    together, on any device, and each as if it were alone.
    """
    word = torch.tensor([_signed(key) for key in keys], device=like.device)[:, None]
    word = word + torch.arange(1, like.shape[1] + 1, device=like.device) * _signed(_STEP)
    for shift, factor in zip(_SHIFTS, (*_MULTIPLIERS, 1), strict=True):
        # The sign is no part of the number: what is shifted in must be zeros.
        word = (word ^ (word >> shift) & (2 ** (64 - shift) - 1)) * _signed(factor)
    # Rounded to float32 the largest of these would be 1, and its noise -inf: a token chosen beforehand would be lost.
    uniform = (((word >> 33 & (2**31 - 1)).float() + 0.5) * 2**-31).clamp(max=1 - 2**-24)
    return -(-torch.log1p(-uniform)).log()


def _signed(word: int) -> int:
    return word - _WORD if word >= _WORD // 2 else word


def _top(logprobs: torch.Tensor, counts: list[int]) -> list[dict[int, float]]:
    most = min(max(counts), logprobs.shape[1])
    if not most:
        return [{} for _ in counts]
    values, indices = (side.tolist() for side in logprobs.topk(most, dim=-1))
    return [
        dict(zip(ids[:count], row[:count], strict=True))
        for ids, row, count in zip(indices, values, counts, strict=True)
    ]
