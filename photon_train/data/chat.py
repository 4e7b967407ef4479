"""Conversations as tokens through the tokenizer's chat template, with the assistant's words marked."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from photon_train.data.progress import warn
from photon_train.data.records import CALLS, Document
from photon_train.errors import PhotonError

_DEFAULT = "default"  # transformers' name of the template that is used where none is named
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def prepare_chat(tokenizer: PreTrainedTokenizerBase, template_file: str | None = None) -> None:
    """Give `tokenizer` the template of `template_file`, if named, and check that it can mark the assistant's words.

    Of several templates it takes the place of ``default``; the others are kept, and so exported.

    Raises:
        PhotonError: if there is no template, the file cannot be read, or the template has no generation tags.
    """
    if template_file is not None:
        try:
            template = Path(template_file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise PhotonError(f"dataset.chat_template {template_file} cannot be read: {error}") from error
        several = isinstance(tokenizer.chat_template, dict)
        tokenizer.chat_template = {**tokenizer.chat_template, _DEFAULT: template} if several else template
    else:
        template = tokenizer.chat_template
    if not template:
        raise PhotonError(
            "dataset.messages_field is set, but the tokenizer has no chat template: name a file of one in "
            "dataset.chat_template"
        )
    if not isinstance(template, str):
        raise PhotonError(
            f"the tokenizer has several chat templates ({', '.join(template)}): name a file in dataset.chat_template, "
            f"which becomes its {_DEFAULT!r}"
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
        PhotonError: if the template refuses a conversation or leaves a part of it out; the message names it.
    """
    for document in documents:
        try:
            ids, learned = encode_chat(tokenizer, document.messages, document.tools)
        except PhotonError as error:
            raise PhotonError(f"{document.name}: {error}") from error
        if learned.any():
            yield document, ids, ~learned


def say_left_out(count: int, conversations: int) -> None:
    """Warn that `count` of so many conversations teach nothing, if any."""
    if count:
        warn(f"{count:,} of {conversations:,} conversations are left out: no token of them is the assistant's")


def encode_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[dict[str, Any]],
    tools: Sequence[dict[str, Any]] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """A conversation as the chat template writes it.

    Args:
        tokenizer: One that `prepare_chat` has accepted.
        messages: Its messages, whole: what they hold beside `role` and `content` is the template's to write.
        tools: Descriptions of the tools that it may call.

    Returns:
        Its ids (int32) and which of them the assistant wrote (bool), each `[tokens]`.

    Raises:
        PhotonError: if the template raises an error, or leaves out the tools or the calls of them.
    """
    text, spans = _write(tokenizer, messages, tools)
    _check_written(tokenizer, messages, tools, text, spans)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    offsets = np.asarray(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2)
    return np.asarray(encoded["input_ids"], dtype=np.int32), tokens_inside(text, spans, offsets)


def tokens_inside(text: str, spans: Sequence[tuple[int, int]], offsets: np.ndarray) -> np.ndarray:
    """Which tokens hold characters of `spans` and, white space apart, no other ones.

    A token counts as holding the characters beside it that belong to no token: where a normaliser composes letters,
    drops or replaces them, that is where the others went. (The mask of `apply_chat_template` asks for the tokens of the
    first and the last character instead: it errs where those have several tokens or none.)

    Args:
        text: What was tokenised.
        spans: First character and the one behind the last.
        offsets: The same of each token, `[tokens, 2]`. A token of white space may be empty, at its end.

    Returns:
        `[tokens]` bool.
    """
    inside = np.zeros(len(text), dtype=bool)
    for first, end in spans:
        inside[first:end] = True
    foreign = ~inside & ~np.fromiter(map(str.isspace, text), dtype=bool, count=len(text))
    first, end = offsets.T
    steps = np.zeros(len(text) + 1, dtype=np.int64)
    np.add.at(steps, first, 1)
    np.add.at(steps, end, -1)
    covered, places = np.cumsum(steps)[:-1] > 0, np.arange(len(text))
    # For each place: behind the last covered character before it, and the first covered one from it on.
    behind = np.concatenate([[0], np.maximum.accumulate(np.where(covered, places + 1, 0))])
    ahead = np.minimum.accumulate(np.append(np.where(covered, places, len(text)), len(text))[::-1])[::-1]
    count = np.concatenate([[0], np.cumsum(inside)])
    count_foreign = np.concatenate([[0], np.cumsum(foreign)])
    holds = count[end] > count[np.where(first == end, np.maximum(first - 1, 0), first)]
    return holds & (count_foreign[ahead[end]] == count_foreign[behind[first]])


def _write(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] | None
) -> tuple[str, list[tuple[int, int]]]:
    """The text of a conversation and its parts that the assistant says: first character and the one behind the last."""
    try:
        (text,), (spans,) = render_jinja_template(
            conversations=[list(messages)],
            tools=list(tools) if tools else None,
            chat_template=_template(tokenizer),
            return_assistant_tokens_mask=True,
            **tokenizer.special_tokens_map,
        )
    except Exception as error:  # templates raise what they like, through jinja2
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise PhotonError(f"the chat template refuses the conversation: {reason}") from error
    return text, spans


def _check_written(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[dict[str, Any]],
    tools: Sequence[dict[str, Any]] | None,
    text: str,
    spans: Sequence[tuple[int, int]],
) -> None:
    """Refuse a template that does without what was to be learned: the model would learn to answer with nothing."""
    if tools and _written(tokenizer, messages, None)[0] == text:
        raise PhotonError(
            "the chat template does not write the record's 'tools': name one that does in dataset.chat_template, or "
            "remove them from the data"
        )
    marked = _marked(text, spans)
    for key in CALLS:
        if not any(message.get(key) for message in messages):
            continue
        without = [{"content": "", **{name: message[name] for name in message if name != key}} for message in messages]
        if _marked(*_written(tokenizer, without, tools)) == marked:
            raise PhotonError(
                f"the chat template does not write {key!r} as the assistant's words: name one that does, inside "
                "{% generation %}, in dataset.chat_template, or leave such conversations out"
            )


def _template(tokenizer: PreTrainedTokenizerBase) -> str:
    """What conversations are written by."""
    templates = tokenizer.chat_template
    return templates[_DEFAULT] if isinstance(templates, dict) else templates


def _written(tokenizer, messages, tools) -> tuple[str | None, list[tuple[int, int]]]:
    try:
        return _write(tokenizer, messages, tools)
    except PhotonError:  # it reads what is missing here
        return None, []


def _marked(text: str | None, spans: Sequence[tuple[int, int]]) -> list[str] | None:
    return None if text is None else [text[first:end] for first, end in spans]
