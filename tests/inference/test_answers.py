"""Answers put together of the events of an engine that is not there."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from photon_train.inference.answers import Style
from photon_train.inference.request import Event, SamplingParams

Answer = pytest.importorskip("photon_train.inference.server").Answer


async def coming(*continuations: list[float]):
    """The tokens of one prompt's continuations, given by their log-probabilities, in turn."""
    for step in range(max(map(len, continuations))):
        for index, values in enumerate(continuations):
            if step < len(values):
                finish = "stop" if step == len(values) - 1 else None
                yield Event(0, index, 7, values[step], f"{index}", finish)


def test_the_best_are_those_of_the_best_mean_and_all_that_was_drawn_is_used():
    """A short continuation has the larger sum; two prompts keep two of three each, and count them one by one."""
    dropped = []
    worker, params = SimpleNamespace(drop=dropped.append), SamplingParams(n=3)
    answer = Answer(worker, [[1, 2], [3]], params, Style(None, None), "tiny", keep=2)
    answer.tickets = [coming([-1.0] * 4, [-2.0], [-0.5]), coming([-3.0], [-1.0, -1.0], [-2.0, -1.0])]
    whole = asyncio.run(answer.whole())
    assert [(choice["index"], choice["text"]) for choice in whole["choices"]] == [
        (0, "2"),
        (1, "0000"),
        (2, "11"),
        (3, "22"),
    ]
    assert whole["usage"] == {"prompt_tokens": 3, "completion_tokens": 11, "total_tokens": 14}
    assert dropped == answer.tickets
