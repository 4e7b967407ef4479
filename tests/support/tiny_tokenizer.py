"""A tokenizer of the tiny vocabulary, shared by the tests."""

from __future__ import annotations

from tiny import VOCABULARY
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Token i is the word ``t`` and i in two digits, so that no word begins with another."""
    words = Tokenizer(models.WordLevel({f"t{index:02d}": index for index in range(VOCABULARY)}, unk_token="t00"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="t00", eos_token="t01", pad_token="t02")
