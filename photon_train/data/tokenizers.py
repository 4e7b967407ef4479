"""The tokenizer of a run: read, fit for the data, known by what it does."""

from __future__ import annotations

import hashlib
import json

from transformers import PreTrainedTokenizerBase

from photon_train.checkpoints import read_tokenizer
from photon_train.config import DataSettings
from photon_train.data.chat import prepare_chat
from photon_train.errors import PhotonError


def tokenizer_for(directory: str, settings: DataSettings) -> PreTrainedTokenizerBase:
    """The tokenizer in `directory` (or of a hub id), ready for `settings`.

    Raises:
        PhotonError: if it cannot be read, has no end-of-text token, or cannot serve conversations.
    """
    tokenizer = read_tokenizer(directory)
    if tokenizer.eos_token_id is None:
        raise PhotonError(f"{directory}: the tokenizer has no eos_token: name one in tokenizer_config.json")
    if settings.messages_field:
        prepare_chat(tokenizer, settings.chat_template)
    return tokenizer


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Check that every id the tokenizer knows has a row in the model's embedding.

    Raises:
        PhotonError: if the largest id (added tokens included) is not below `vocab_size`.
    """
    largest = largest_id(tokenizer)
    if largest >= vocab_size:
        raise PhotonError(
            f"the tokenizer has ids up to {largest} but the model's vocab_size is {vocab_size}: "
            "they do not belong together, or tokens were added without resizing the embeddings"
        )


def largest_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The largest id that the tokenizer can give; a vocabulary with gaps has fewer tokens than that."""
    return max(tokenizer.get_vocab().values())


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of what decides about the tokens: vocabulary, rules, special tokens and chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.loads(backend.to_str()) if backend is not None else tokenizer.get_vocab()
    for state in ("padding", "truncation"):  # set by calls
        rules.pop(state, None)
    parts = [
        json.dumps(rules, sort_keys=True),
        str(tokenizer.bos_token_id),
        str(tokenizer.eos_token_id),
        str(tokenizer.chat_template),
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
