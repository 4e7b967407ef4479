"""A tiny dense checkpoint with a tokenizer of its own, as a user would have it on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tiny_dense import save_dense
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Every byte is a token; one more ends a text."""
    vocabulary = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocabulary["<|end|>"] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


def tiny_checkpoint(directory: Path, model_type: str = "llama", **changes: Any) -> Path:
    """Write a tiny dense model and its tokenizer to `directory`."""
    tokenizer = byte_tokenizer()
    save_dense(directory, model_type, vocab_size=len(tokenizer), **changes)
    tokenizer.save_pretrained(directory)
    return directory
