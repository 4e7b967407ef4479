"""The sample of the report."""

from __future__ import annotations

import torch
from tiny import VOCABULARY, photon_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from photon_train.evaluation.sample import sample_text


def make_tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({f"t{index:02d}": index for index in range(VOCABULARY)}, unk_token="t00"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="t01")


def test_continues_the_prompt_the_same_way_each_time() -> None:
    model, tokenizer = photon_model("memory-1"), make_tokenizer()
    state = torch.random.get_rng_state()
    text = sample_text(model, tokenizer, "t05 t06", 12)
    words = text.split()
    assert 1 <= len(words) <= 12 and words[:2] != ["t05", "t06"]
    assert sample_text(model, tokenizer, "t05 t06", 12) == text
    assert torch.equal(torch.random.get_rng_state(), state)
    assert sample_text(model, tokenizer, "t05 t06", 12, seed=1) != text


def test_without_a_prompt_or_tokens() -> None:
    model, tokenizer = photon_model("memory-1"), make_tokenizer()
    assert sample_text(model, tokenizer, "", 8)
    assert sample_text(model, tokenizer, "t05", 0) == ""
