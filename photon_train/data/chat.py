"""Conversations as tokens through the tokenizer's chat template, with the assistant's words marked."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from photon_train.data.corpora import Document
from photon_train.errors import PhotonError

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def prepare_chat(tokenizer: PreTrainedTokenizerBase, template_file: str | None = None) -> None:
    """Give `tokenizer` the template of `template_file`, if named, and check that it can mark the assistant's words.

    Raises:
        PhotonError: if there is no template, the file cannot be read, or the template has no generation tags.
    """
    if template_file is not None:
        try:
            tokenizer.chat_template = Path(template_file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise PhotonError(f"dataset.chat_template {template_file} cannot be read: {error}") from error
    template = tokenizer.chat_template
    if not template:
        raise PhotonError(
            "dataset.messages_field is set, but the tokenizer has no chat template: name a file of one in "
            "dataset.chat_template"
        )
    if not isinstance(template, str):
        raise PhotonError(
            f"the tokenizer has several chat templates ({', '.join(template)}): name a file in dataset.chat_template"
        )
    if not _GENERATION.search(template):
        raise PhotonError(
            "the chat template does not tell which tokens the assistant wrote, so the loss cannot be on them alone: "
            "enclose the assistant's words in {% generation %} ... {% endgeneration %} in a copy of it and name that "
            "file in dataset.chat_template"
        )
    if not tokenizer.is_fast:
        raise PhotonError(
            "dataset.messages_field needs a fast tokenizer (tokenizer.json), which finds the assistant's words"
        )


def tokenize_chats(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[Document, np.ndarray, np.ndarray]]:
    """Each conversation, its ids (int32) and where nothing is learned (bool); silent assistants are left out.

    Raises:
        PhotonError: if the template refuses a conversation; the message names it.
    """
    for document in documents:
        try:
            encoded = tokenizer.apply_chat_template(
                list(document.messages), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
        except Exception as error:  # templates raise what they like, through jinja2
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise PhotonError(f"{document.name}: the chat template refuses the conversation: {reason}") from error
        learned = np.asarray(encoded["assistant_masks"], dtype=bool)
        if learned.any():
            yield document, np.asarray(encoded["input_ids"], dtype=np.int32), ~learned
