"""Multi-query integration: one answer out of n continuations of a prompt."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable

from photon_train.errors import PhotonError
from photon_train.inference.request import Completion


def best_mean_logprob(completions: list[Completion]) -> Completion:
    """The continuation with the highest mean log-probability per token; the first of equals.

    Raises:
        PhotonError: if there is none that has not failed.
    """
    return max(_some(completions), key=lambda completion: completion.mean_logprob)


def majority_vote(
    completions: list[Completion], answer: Callable[[Completion], Hashable | None] | None = None
) -> Completion:
    """The most probable of the continuations that give the most frequent answer.

    Args:
        answer: What is voted on, for example a number found in the text; None abstains. Default: the stripped text,
            or the tokens where there is no text.

    Ties go to the answer with the higher best mean log-probability. If all abstain, all are counted as equals.

    Raises:
        PhotonError: if there is no continuation that has not failed.
    """
    completions = _some(completions)
    votes = [(answer or _whole)(completion) for completion in completions]
    counts = Counter(vote for vote in votes if vote is not None)
    most = max(counts.values(), default=0)
    winners = {vote for vote, count in counts.items() if count == most} or {None}
    return best_mean_logprob([c for c, vote in zip(completions, votes, strict=True) if vote in winners])


def _whole(completion: Completion) -> Hashable:
    return tuple(completion.tokens) if completion.text is None else completion.text.strip()


def _some(completions: list[Completion]) -> list[Completion]:
    answered = [completion for completion in completions if completion.error is None]
    if not answered:
        raise PhotonError("there is no continuation to choose from")
    return answered
