"""A dense model's cache made smaller by others (kvpress, optimum-quanto), as tools/compare_long.py measures it."""

from __future__ import annotations

import dataclasses
from argparse import Namespace

import kvpress
import pytest
from compare_long import evaluated
from tiny_checkpoint import tiny_checkpoint
from tiny_prose import prose
from transformers import AutoModelForCausalLM, AutoTokenizer

from photon_train.data.corpora import Document
from photon_train.errors import PhotonError
from photon_train.evaluation.long import LongSettings, evaluate_long, prepare_long

LENGTH = 2048  # a prompt of the tasks is no shorter in bytes


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A dense model, what is asked of a comparison, its inputs, and the dense model's own row."""
    directory = tiny_checkpoint(tmp_path_factory.mktemp("caches") / "dense")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype="float32")
    settings = LongSettings((LENGTH,), sequences=1, samples=2, tasks=("niah_single", "vt"), batch_size=1)
    inputs = prepare_long([Document("text", prose(0, 200))], tokenizer, settings)
    (row,) = evaluate_long(model, tokenizer, inputs)
    return model, Namespace(tokenizer=tokenizer), inputs, row


def rows_of(total: float) -> list[dict]:
    return [{"name": "ours", "length": LENGTH, "kv_total_percent": total}]


SNAP = {"plan": "dense", "name": "snap", "press": "SnapKVPress", "same_cache_as": "ours"}


def test_a_press_that_drops_nothing_answers_as_the_dense_model(measured):
    model, comparison, inputs, dense = measured
    ((row, size),) = evaluated(model, SNAP, comparison, inputs, rows_of(100.0))
    assert row["needle_nll"] == pytest.approx(dense["needle_nll"], abs=1e-4)
    assert row["ruler_tasks"] == dense["ruler_tasks"] and row["ce"] is None
    assert size == {"kv_growing_percent": None, "kv_total_percent": 100.0}


def test_a_press_keeps_the_bytes_of_another_plan(measured, monkeypatch):
    model, comparison, inputs, dense = measured
    kept = []

    class Recorded(kvpress.SnapKVPress):
        def compress(self, module, hidden_states, keys, *rest):
            keys, values = super().compress(module, hidden_states, keys, *rest)
            kept.append(keys.shape[2])
            return keys, values

    monkeypatch.setattr(kvpress, "SnapKVPress", Recorded)
    ((row, _),) = evaluated(model, SNAP, comparison, inputs, rows_of(20.0))
    # The question's 128 tokens are read afterwards, and stay.
    assert len(kept) == 4 * model.config.num_hidden_layers
    assert all(abs(each + 128 - 0.2 * LENGTH) <= 1 for each in kept)
    assert row["needle_nll"] != pytest.approx(dense["needle_nll"], abs=1e-4)
    with pytest.raises(PhotonError, match="a cache of 102 tokens holds no more than the question"):
        list(evaluated(model, SNAP, comparison, inputs, rows_of(5.0)))
    with pytest.raises(PhotonError, match=r"snap takes the bytes of 'ours': measure that first at \[2048\]"):
        list(evaluated(model, SNAP, comparison, inputs, []))
    with pytest.raises(PhotonError, match="kvpress has no NoPress"):
        list(evaluated(model, {**SNAP, "press": "NoPress"}, comparison, inputs, rows_of(20.0)))


def test_a_cache_in_fewer_bits_is_farther_from_the_dense_model(measured):
    model, comparison, inputs, dense = measured
    inputs = dataclasses.replace(inputs, settings=dataclasses.replace(inputs.settings, tasks=("niah_single",)))
    errors = []
    for bits in (4, 2):
        plan = {"plan": "dense", "name": "quantised", "cache_bits": bits}
        ((row, size),) = evaluated(model, plan, comparison, inputs, [])
        # A scale and a shift of 32 bits for the 8 numbers of a head.
        assert size["kv_growing_percent"] == size["kv_total_percent"] == 100 * (bits + 8) / 32
        errors.append(abs(row["needle_nll"] - dense["needle_nll"]))
    assert 0 < errors[0] < errors[1]
