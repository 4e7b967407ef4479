"""One record of a data set as a document: its text, or its conversation with the tools that it may call."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from photon_train.config import DataSettings
from photon_train.errors import PhotonError, printable

CALLS = ("tool_calls", "function_call")
"""What an assistant's message may hold in place of `content`; the second is the older name."""
TOOLS_FIELD = "tools"


@dataclass(frozen=True)
class Document:
    """A text and the name that decides which split it falls in.

    Attributes:
        name: Unique within the source and independent of where the source lies on disk.
        text: Not empty.
        messages: Of a conversation, its messages as they are (`role`, `content`, `tool_calls`, ...), without empty
            entries; `text` then joins what they say.
        tools: Of a conversation, the descriptions of the tools that it may call.
    """

    name: str
    text: str
    messages: tuple[dict[str, Any], ...] | None = None
    tools: tuple[dict[str, Any], ...] | None = None


def wanted_fields(settings: DataSettings) -> tuple[str, ...]:
    """Fields of a record that are read; only the first must be there."""
    return (settings.messages_field, TOOLS_FIELD) if settings.messages_field else (settings.text_field,)


def document_of(name: str, record: dict[str, Any], settings: DataSettings, where: str) -> Document:
    """The text, or with `dataset.messages_field` the conversation, of one record.

    Args:
        name: Of the document.
        record: Its fields.
        settings: Names the field.
        where: The place of the record, for errors.

    Raises:
        PhotonError: if the field is missing or holds something else.
    """
    field = wanted_fields(settings)[0]
    if field not in record:
        raise missing_field(where, settings, record)
    value = record[field]
    if settings.messages_field:
        messages = _messages(value, field, where)
        tools = _tools(record.get(TOOLS_FIELD), where) if messages else None
        return Document(name, "\n".join(map(_said, messages)), messages, tools)
    if value is None:
        return Document(name, "")
    if not isinstance(value, str):
        hint = "; for conversations set dataset.messages_field" if isinstance(value, list) else ""
        raise PhotonError(f"{where}: {field!r} holds {type(value).__name__}, not text; set dataset.text_field{hint}")
    return Document(name, _sound(value))


def missing_field(where: str, settings: DataSettings, fields: Iterable[str]) -> PhotonError:
    """The error for a record or a table that has `fields`, but not the one that `settings` names."""
    key = "messages_field" if settings.messages_field else "text_field"
    present = printable(", ".join(fields)) or "none"
    return PhotonError(f"{where}: no field {getattr(settings, key)!r} (present: {present}); set dataset.{key}")


def without_nulls(value: Any) -> Any:
    """`value` without empty entries: a column gives every object the fields of all, most of them empty."""
    if isinstance(value, dict):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _messages(value: Any, field: str, where: str) -> tuple[dict[str, Any], ...]:
    if value is None:
        return ()
    wrong = [message for message in value if not _is_message(message)] if isinstance(value, list) else [value]
    if wrong:
        raise PhotonError(
            f"{where}: {field!r} must be a list of messages with the texts 'role' and 'content' (the latter may be "
            f"missing beside 'tool_calls'); found {str(wrong[0])[:60]!r} (dataset.messages_field)"
        )
    return tuple(_sound({key: inner for key, inner in message.items() if inner is not None}) for message in value)


def _is_message(message: Any) -> bool:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        return False
    content = message.get("content")
    return isinstance(content, str) or (content is None and any(message.get(key) for key in CALLS))


def _said(message: dict[str, Any]) -> str:
    calls = [json.dumps(message[key], ensure_ascii=False, default=str) for key in CALLS if message.get(key)]
    return "\n".join(filter(None, [message.get("content"), *calls]))


def _tools(value: Any, where: str) -> tuple[dict[str, Any], ...] | None:
    if isinstance(value, str):  # tables cannot hold objects of different shapes and keep them as JSON
        try:
            value = json.loads(value) if value.strip() else None
        except (ValueError, RecursionError) as error:
            raise PhotonError(f"{where}: {TOOLS_FIELD!r} is no valid JSON: {error}") from error
    if not value:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise PhotonError(
            f"{where}: {TOOLS_FIELD!r} must be a list of objects that describe tools (or that list as JSON); found "
            f"{str(value)[:60]!r}: remove or rename the field if it is something else"
        )
    return tuple(_sound(value))


def _sound(value: Any) -> Any:
    """`value` as UTF-8 can hold it: JSON may escape half of a surrogate pair, which no tokenizer takes."""
    if isinstance(value, dict):
        return {_sound(key): _sound(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_sound(inner) for inner in value]
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return value
