"""One answer out of several continuations."""

from __future__ import annotations

import pytest
from tiny import photon_model

from lib.merge import best_mean_logprob, majority_vote
from photon_train.errors import PhotonError
from photon_train.inference.engine import Engine, EngineSettings
from photon_train.inference.request import Completion, SamplingParams


def completion(text: str | None, *logprobs: float) -> Completion:
    return Completion(0, list(range(len(logprobs))), list(logprobs), [], text, "stop")


def test_best_is_by_the_mean_not_the_sum():
    long, short = completion("a", -0.5, -0.5, -0.5), completion("b", -1.0)
    assert best_mean_logprob([short, long]) is long


def test_majority_takes_the_most_frequent_answer_at_its_most_probable():
    answers = [completion("7 ", -2.0), completion("8", -0.1), completion("7", -1.0)]
    assert majority_vote(answers) is answers[2]


def test_a_tie_goes_to_the_more_probable_answer():
    answers = [completion("7", -2.0), completion("8", -0.1)]
    assert majority_vote(answers) is answers[1]


def test_votes_may_abstain():
    answers = [completion("none", -0.1), completion("none", -0.1), completion("x = 4", -3.0)]

    def number(one: Completion) -> int | None:
        return int(one.text.split("=")[1]) if "=" in one.text else None

    assert majority_vote(answers, number) is answers[2]
    assert majority_vote(answers[:2], number) is answers[0]


def test_without_text_the_tokens_are_the_answer():
    answers = [completion(None, -1.0, -1.0), completion(None, -0.1), completion(None, -0.5, -0.5)]
    assert majority_vote(answers) is answers[2]


def test_no_continuation_is_refused():
    for merge in (best_mean_logprob, majority_vote):
        with pytest.raises(PhotonError, match="no continuation"):
            merge([])


def test_continuations_of_the_engine_are_merged():
    model = photon_model("memory")
    model.generation_config.eos_token_id = None
    engine = Engine(model, settings=EngineSettings(max_length=64, max_sequences=4))
    answers = engine.generate([[5, 6, 7, 8]], SamplingParams(max_new_tokens=3, n=9, temperature=2.0))[0]
    assert len(answers) == 9
    assert best_mean_logprob(answers).mean_logprob == max(answer.mean_logprob for answer in answers)
    assert majority_vote(answers) in answers
