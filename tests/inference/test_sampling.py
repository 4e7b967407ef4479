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
from photon_train.inference.sampler import (
    _MULTIPLIERS,
    _SHIFTS,
    _STEP,
    _mix,
    gumbel,
    penalise,
    sample,
    score,
    stream_key,
    warp,
)


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
        torch.testing.assert_close(warp(row[None], [settings]), expected)


def test_rows_are_warped_as_if_alone():
    rows = logits(5)
    settings = [{"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.2}, {}, {"top_k": 9, "top_p": 0.7, "min_p": 0.1}]
    params = [SamplingParams(temperature=0.5 + index, **one) for index, one in enumerate(settings)]
    together = warp(rows, params)
    for index, one in enumerate(params):
        torch.testing.assert_close(together[index], warp(rows[index : index + 1], [one])[0])


def test_repetition_penalty_equals_transformers():
    row = logits(1)
    occurred = [3, 9, 9, 41]
    expected = RepetitionPenaltyLogitsProcessor(1.4)(torch.tensor([occurred]), row)
    rows = torch.cat([row, row])
    torch.testing.assert_close(penalise(rows, [sorted(set(occurred)), [5]], [1.4, 1.0]), torch.cat([expected, row]))


def test_penalty_counts_prompt_and_output_and_works_with_greedy():
    one = sequence(repetition_penalty=5.0)
    one.output = [7]
    row = torch.zeros(10)
    row[[3, 7, 1]] = torch.tensor([9.0, 8.0, 2.0])
    assert sample(row[None], [one])[0].token == 1


def test_penalties_of_generated_tokens_and_biases():
    """As OpenAI states them: counted in what was generated alone, additive, each row by itself."""
    rows = logits(3)
    settings = [
        {"frequency_penalty": 0.75, "presence_penalty": 1.5},
        {"logit_bias": {9: 20.0, 3: -100.0}, "frequency_penalty": -0.5},
        {"logit_bias": {5: 2.0}, "repetition_penalty": 2.0},
    ]
    outputs = [[7, 7, 9, 7], [9], [5]]
    expected = rows.clone()
    expected[0, 7] -= 3 * 0.75 + 1.5
    expected[0, 9] -= 0.75 + 1.5
    expected[1, 9] += 20.0 + 0.5
    expected[1, 3] -= 100.0
    expected[2, 5] += 2.0  # the bias comes before the penalties
    for token in (3, 4, 5):
        expected[2, token] = expected[2, token] * 2 if expected[2, token] < 0 else expected[2, token] / 2
    seen = []
    many = [sequence(temperature=1.0, seed=4, **one) for one in settings]
    for one, output in zip(many, outputs, strict=True):
        one.output = output
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("photon_train.inference.sampler.warp", lambda found, _: seen.append(found) or found)
        together = sample(rows, many)
        alone = [sample(rows[index : index + 1], [one])[0] for index, one in enumerate(many)]
    torch.testing.assert_close(seen[0], expected)
    torch.testing.assert_close(torch.cat(seen[1:]), expected)
    assert [choice.token for choice in together] == [choice.token for choice in alone]
    # What is reported is the model's.
    assert [choice.logprob for choice in together] == pytest.approx(
        [float(rows.log_softmax(-1)[index, choice.token]) for index, choice in enumerate(together)]
    )


def test_a_penalty_keeps_greedy_decoding_from_repeating():
    row, one = torch.zeros(1, 10), sequence(presence_penalty=2.0)
    row[0, [3, 1, 8]] = torch.tensor([1.5, 1.0, 0.5])  # 3 is of the prompt, which does not count
    for _ in range(3):
        one.output.append(sample(row, [one])[0].token)
    assert one.output == [3, 1, 8]
    banned = sequence(logit_bias={3: -100.0, 1: -100.0})
    assert sample(row, [banned])[0].token == 8


@pytest.mark.parametrize("temperature", [0.0, 1e-46, 1e-40, 1e-6, 1e-5])
def test_the_lowest_temperatures_take_the_best_token(temperature):
    rows = logits()
    chosen = sample(rows, [sequence(temperature=temperature) for _ in rows])
    assert [choice.token for choice in chosen] == rows.argmax(dim=-1).tolist()


def test_draws_follow_the_distribution():
    one = sequence(temperature=1.0, top_k=4, seed=1)
    row = torch.tensor([1.0, 2.0, 0.5, -1.0, 1.5, -3.0])
    rows, draws = row.expand(4000, -1), []
    for seed in range(2):
        many = [sequence(temperature=1.0, top_k=4, seed=2000 * seed + start) for start in range(4000)]
        draws += [choice.token for choice in sample(rows, many)]
    for _ in range(2000):
        draws.append(sample(row[None], [one])[0].token)
        one.output.append(0)
    draws = torch.tensor(draws)
    share = torch.bincount(draws, minlength=6) / len(draws)
    expected = warp(row[None], [one.params])[0].softmax(-1)
    assert (share - expected).abs().max() < 0.015
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


def test_given_tokens_of_logits_in_16_bits_are_scored_with_all_digits(monkeypatch):
    """Whatever pieces they come in; the most probable of them has rank 1, and equals do not count."""
    monkeypatch.setattr("photon_train.inference.sampler.SCORED_AT_ONCE", 100)
    rows = logits(5).bfloat16()
    rows[0, 7] = rows[0, 8] = 20.0
    given = [7, 8, *rows[2:].argmin(dim=-1).tolist()]
    expected = rows.double().log_softmax(-1)
    for found, token, row in zip(score(rows, given, 2), given, expected, strict=True):
        assert found.token == token and found.logprob == pytest.approx(row[token].item(), abs=1e-5)
        assert found.rank == 1 + int((row > row[token]).sum())
        assert list(found.top.values()) == pytest.approx(row.topk(2).values.tolist(), abs=1e-5)


def test_each_row_reports_as_many_of_the_most_probable_as_it_asked_for():
    rows = logits(3)
    settings = [{"top_logprobs": 2}, {}, {"top_logprobs": 5}]
    choices = sample(rows, [sequence(**one) for one in settings])
    for choice, row, count in zip(choices, rows, (2, 0, 5), strict=True):
        assert list(choice.top) == row.topk(count).indices.tolist()


def test_streams_of_neighbouring_seeds_continuations_and_steps_differ():
    keys = set()
    for seed in (0, 1):
        for index in (0, 1):
            one = Sequence(0, index, [3], SamplingParams(temperature=1.0, seed=seed), [])
            for _ in range(3):
                keys.add(stream_key(one))
                one.output.append(7)
    assert len(keys) == 12


def test_noise_is_gumbel_and_independent_across_tokens_rows_and_steps():
    keys = [stream_key(sequence(temperature=1.0, seed=seed)) for seed in range(64)]
    noise = gumbel(keys, torch.zeros(64, 4096)).double()
    assert noise.isfinite().all()
    # Distribution function exp(-exp(-x)) against the sorted sample (Kolmogorov's bound at 1e-4).
    expected = torch.exp(-torch.exp(-noise.flatten().sort().values))
    steps = (torch.arange(noise.numel()) + 0.5) / noise.numel()
    assert (expected - steps).abs().max() < 2.23 / noise.numel() ** 0.5
    centred = (noise - noise.mean()) / noise.std()
    for one, other in ((centred[1:], centred[:-1]), (centred[:, 1:], centred[:, :-1])):
        assert abs(float((one * other).mean())) < 4 / one.numel() ** 0.5


def unmixed(word: int) -> int:
    """What `_mix` turns into `word`."""
    for shift, factor in reversed(list(zip(_SHIFTS, (*_MULTIPLIERS, 1), strict=True))):
        mixed = word = word * pow(factor, -1, 2**64) % 2**64
        for _ in range(64 // shift):
            word = mixed ^ word >> shift
    return word


def test_the_only_candidate_is_drawn_whatever_its_number(monkeypatch):
    """The largest number, 64 ones, and the smallest."""
    for number in (2**64 - 1, 0):
        key = (unmixed(number) - 3 * _STEP) % 2**64  # the third token's
        assert _mix((key + 3 * _STEP) % 2**64) == number
        monkeypatch.setattr("photon_train.inference.sampler.stream_key", lambda sequence, key=key: key)
        row = torch.tensor([[0.0, 1.0, 2.0, 1.0]])
        assert sample(row, [sequence(temperature=1.0, top_k=1)])[0].token == 2


def test_splitmix_is_the_published_one():
    """The first numbers of the reference implementation, started at 1234567."""
    first = [_mix((1234567 + count * _STEP) % 2**64) for count in (1, 2, 3)]
    assert first == [6457827717110365317, 3203168211198807973, 9817491932198370423]
    noise = gumbel([1234567, 2**64 - 5], torch.zeros(2, 3)).double()
    numbers = [*first, *(_mix((2**64 - 5 + count * _STEP) % 2**64) for count in (1, 2, 3))]
    uniform = torch.tensor([((number >> 33) + 0.5) / 2**31 for number in numbers], dtype=torch.float64)
    torch.testing.assert_close(noise.flatten(), -(-(1 - uniform).log()).log(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"temperature": -1}, "temperature=-1"),
        ({"top_p": 0}, "top_p=0 must be positive"),
        ({"top_p": 1.5}, "top_p=1.5 must not exceed 1"),
        ({"min_p": 2}, "min_p=2"),
        ({"n": 0}, "n=0"),
        ({"frequency_penalty": 2.1}, "frequency_penalty=2.1 is not between -2 and 2"),
        ({"presence_penalty": float("nan")}, "presence_penalty=nan"),
        ({"logit_bias": {7: -101}}, "logit_bias of token 7 is -101"),
        ({"logit_bias": {7: float("nan")}}, "logit_bias of token 7 is nan"),
        ({"prompt_logprobs": -1}, "prompt_logprobs=-1"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"repetition_penalty": 0}, "repetition_penalty=0"),
        ({"stop": ("a", "")}, "stop holds an empty text"),
        ({"temperature": float("nan")}, "temperature=nan"),
    ],
)
def test_bad_settings_are_refused(params, message):
    with pytest.raises(PhotonError, match=message):
        SamplingParams(**params)
