"""The sample of the report."""

from __future__ import annotations

import torch
from tiny import photon_model
from tiny_tokenizer import word_tokenizer

from photon_train.evaluation.sample import sample_text


def test_continues_the_prompt_the_same_way_each_time() -> None:
    model, tokenizer = photon_model("memory-1"), word_tokenizer()
    state = torch.random.get_rng_state()
    text = sample_text(model, tokenizer, "t05 t06", 12)
    words = text.split()
    assert 1 <= len(words) <= 12 and words[:2] != ["t05", "t06"]
    assert sample_text(model, tokenizer, "t05 t06", 12) == text
    assert torch.equal(torch.random.get_rng_state(), state)
    assert sample_text(model, tokenizer, "t05 t06", 12, seed=1) != text


def test_without_a_prompt_or_tokens() -> None:
    model, tokenizer = photon_model("memory-1"), word_tokenizer()
    assert sample_text(model, tokenizer, "", 8)
    assert sample_text(model, tokenizer, "t05", 0) == ""
