"""Fixtures of the export's tests."""

from __future__ import annotations

import pytest
from tiny_tokenizer import word_tokenizer
from transformers import PreTrainedTokenizerFast


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return word_tokenizer()
