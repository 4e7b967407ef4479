"""A model and a text so small that what is broken is the way and not the work."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def make_inputs(directory: Path) -> tuple[Path, Path]:
    """A dense model with a tokenizer of bytes, and a text."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate([*symbols, "<end>"])}, merges=[]))
    tokens.pre_tokenizer, tokens.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, eos_token="<end>")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), num_hidden_layers=4, eos_token_id=len(tokenizer) - 1, **sizes)
    LlamaForCausalLM(config).save_pretrained(directory / "dense")
    tokenizer.save_pretrained(directory / "dense")
    text = directory / "text.txt"
    text.write_text("\n\n".join(f"Line {line} of a text says {line * line % 7}." for line in range(900)))
    return directory / "dense", text
