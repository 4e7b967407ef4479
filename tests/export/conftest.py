"""Fixtures of the export's tests."""

from __future__ import annotations

import pytest
from tiny import VOCABULARY
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """One word per token of the tiny vocabulary."""
    words = Tokenizer(models.WordLevel({f"t{index:02d}": index for index in range(VOCABULARY)}, unk_token="t00"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="t00", eos_token="t01", pad_token="t02")
