"""Sampling against transformers' own processors, and against the distribution it must follow."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from photon_train.errors import PhotonError
from photon_train.inference.request import SamplingParams, Sequence
from photon_train.inference.sampler import penalise, sample, warp


def sequence(**params) -> Sequence:
    return Sequence(0, 0, [3, 4], SamplingParams(**params), [])


def logits(rows: int = 6, vocabulary: int = 50) -> torch.Tensor:
    return 3 * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.7},
        {"temperature": 1.0, "top_k": 7},
        {"temperature": 1.3, "top_p": 0.8},
        {"temperature": 1.0, "min_p": 0.1},
        {"temperature": 1.7, "top_k": 30, "top_p": 0.9, "min_p": 0.05},
        {"temperature": 1.0, "top_k": 500, "top_p": 1e-6},
    ],
)
def test_warping_equals_transformers(params):
    settings = SamplingParams(**params)
    for row in logits():
        expected = TemperatureLogitsWarper(settings.temperature)(None, row[None])
        if settings.top_k:
            expected = TopKLogitsWarper(settings.top_k)(None, expected)
        if settings.top_p < 1:
            expected = TopPLogitsWarper(settings.top_p)(None, expected)
        if settings.min_p:
            expected = MinPLogitsWarper(settings.min_p)(None, expected)
        torch.testing.assert_close(warp(row, settings), expected[0])


def test_repetition_penalty_equals_transformers():
    row = logits(1)
    occurred = [3, 9, 9, 41]
    expected = RepetitionPenaltyLogitsProcessor(1.4)(torch.tensor([occurred]), row)
    torch.testing.assert_close(penalise(row[0], sorted(set(occurred)), 1.4), expected[0])


def test_penalty_counts_prompt_and_output_and_works_with_greedy():
    one = sequence(repetition_penalty=5.0)
    one.output = [7]
    row = torch.zeros(10)
    row[[3, 7, 1]] = torch.tensor([9.0, 8.0, 2.0])
    assert sample(row[None], [one])[0].token == 1


def test_draws_follow_the_distribution():
    one = sequence(temperature=1.0, top_k=4, seed=1)
    row = torch.tensor([1.0, 2.0, 0.5, -1.0, 1.5, -3.0])
    draws = torch.tensor([sample(row[None], [one])[0].token for _ in range(4000)])
    share = torch.bincount(draws, minlength=6) / len(draws)
    expected = warp(row, one.params).softmax(-1)
    assert (share - expected).abs().max() < 0.03
    assert share[expected == 0].sum() == 0


def test_a_row_depends_on_itself_alone():
    rows = logits(4)
    settings = [{"temperature": 1.0, "seed": 5}, {}, {"temperature": 0.5, "top_p": 0.9}, {"repetition_penalty": 1.2}]
    together = sample(rows, [sequence(**one) for one in settings])
    alone = [sample(rows[index : index + 1], [sequence(**one)])[0] for index, one in enumerate(settings)]
    assert [choice.token for choice in together] == [choice.token for choice in alone]
    assert together[1].token == int(rows[1].argmax())


def test_logprobs_are_the_models_whatever_the_settings():
    rows = logits(2)
    expected = rows.log_softmax(-1)
    for one in ({"top_logprobs": 3}, {"temperature": 0.3, "top_k": 2, "top_logprobs": 3}):
        for index, choice in enumerate(sample(rows, [sequence(**one), sequence(**one)])):
            assert choice.logprob == pytest.approx(float(expected[index, choice.token]), abs=1e-6)
            assert list(choice.top) == expected[index].topk(3).indices.tolist()
            assert list(choice.top.values()) == pytest.approx(expected[index].topk(3).values.tolist())


def test_continuations_of_neighbouring_seeds_differ():
    generators = [
        Sequence(0, i, [3], SamplingParams(temperature=1.0, seed=s), []).generator for s in (0, 1) for i in (0, 1)
    ]
    assert len({float(torch.rand(1, generator=generator)) for generator in generators}) == 4


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"temperature": -1}, "temperature=-1"),
        ({"top_p": 0}, "top_p=0 must be positive"),
        ({"top_p": 1.5}, "top_p=1.5 must not exceed 1"),
        ({"min_p": 2}, "min_p=2"),
        ({"n": 0}, "n=0"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"repetition_penalty": 0}, "repetition_penalty=0"),
        ({"stop": ("a", "")}, "stop holds an empty text"),
        ({"temperature": float("nan")}, "temperature=nan"),
    ],
)
def test_bad_settings_are_refused(params, message):
    with pytest.raises(PhotonError, match=message):
        SamplingParams(**params)
