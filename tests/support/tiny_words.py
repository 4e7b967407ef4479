"""A text of a few words and a tokenizer trained on them that can write anything, shared by the tests."""

from __future__ import annotations

import torch
from tiny_chat import TEMPLATE
from transformers import PreTrainedTokenizerFast

from photon_train.data.pretrain import train_tokenizer
from photon_train.data.retrieval import LIST_TEMPLATE, TEMPLATES

WORDS = "the quick brown fox jumps over a lazy dog while rain falls on old stones and nobody counts them".split()

# What is written about the text is in few tokens too.
_SEEN = [" ".join(WORDS), *(text for template in (*TEMPLATES, LIST_TEMPLATE) for text in template)] * 3
TOKENIZER = train_tokenizer(iter(_SEEN), 600)
_CHOSEN = torch.randint(len(WORDS), (2000,), generator=torch.Generator().manual_seed(0)).tolist()
TEXT = torch.tensor(TOKENIZER(" ".join(WORDS[number] for number in _CHOSEN))["input_ids"])


def chat_tokenizer() -> PreTrainedTokenizerFast:
    """The same with a chat template."""
    tokenizer = train_tokenizer(iter(_SEEN), 600)
    tokenizer.chat_template = TEMPLATE
    return tokenizer
