"""Conversations: only what the assistant says is learned, whatever the packing; and what is said when it cannot be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_chat import CALL, TEMPLATE, TOOL, TOOL_TEMPLATE, UNMARKED, chat_file, conversation
from tiny_checkpoint import byte_tokenizer

from photon_train.config import DataSettings
from photon_train.data.chat import encode_chat, prepare_chat, tokenize_chats
from photon_train.data.corpora import Document, read_documents, split_documents
from photon_train.data.packing import IGNORED_LABEL, pack
from photon_train.errors import PhotonError

CHAT = DataSettings(messages_field="messages")


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def chats(*conversations: list[dict[str, str]]) -> list[Document]:
    return [Document(f"c{i}", "-", tuple(messages)) for i, messages in enumerate(conversations)]


@pytest.mark.parametrize(("seq_len", "align"), [(16, 1), (16, 4), (64, 16), (256, 1)])
def test_labels_are_the_assistants_words_and_their_end(tokenizer, seq_len: int, align: int) -> None:
    """Also where a conversation is longer than the sequence and goes on in the next."""
    first, second = conversation("hi", "hello you", "and?", "fine."), conversation("one more question", "no")
    data = pack(chats(first, second), tokenizer, seq_len, align, 256, pad_last=True, progress=False)
    rows = data.batch(torch.arange(len(data)))
    learned = rows["labels"][rows["labels"] != IGNORED_LABEL]
    assert tokenizer.decode(learned.tolist()) == "hello you<|end|>fine.<|end|>no<|end|>"
    kept = rows["input_ids"] if data.filler is None else rows["input_ids"][~data.filler]
    whole = "".join(tokenizer.apply_chat_template(messages, tokenize=False) for messages in (first, second))
    assert tokenizer.decode(kept.flatten().tolist()) == whole
    assert data.num_documents == 2 and data.num_tokens == len(kept.flatten())


def test_a_conversation_without_an_answer_is_left_out(tokenizer) -> None:
    data = pack(chats(conversation("hi"), conversation("a", "b")), tokenizer, 32, 1, 256, progress=False)
    assert data.num_documents == 1


def test_files_of_conversations_are_read_and_split(tokenizer, tmp_path: Path) -> None:
    import pyarrow.json
    import pyarrow.parquet

    jsonl = chat_file(tmp_path / "chat.jsonl")
    documents = list(read_documents(str(jsonl), CHAT))
    assert documents[3].messages[1] == {"role": "assistant", "content": "A number, 3."}
    pyarrow.parquet.write_table(pyarrow.json.read_json(jsonl), tmp_path / "chat.parquet")
    again = read_documents(str(tmp_path / "chat.parquet"), CHAT)
    assert [document.messages for document in again] == [document.messages for document in documents]
    train, held_out = split_documents(documents, 0.2)
    assert len(train) + len(held_out) == 30 and held_out
    with pytest.raises(PhotonError, match="the only conversation"):
        split_documents(documents[:1], 0.2)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"messages": {"role": "user", "content": "hi"}}, "must be a list of messages .*; found \"{'role': 'user'"),
        ({"messages": False}, "must be a list of messages .*; found 'False'"),
        ({"messages": [None]}, "must be a list of messages"),
        ({"messages": [{"role": "assistant", "tool_calls": []}]}, "must be a list of messages"),
        ({"messages": conversation("a", "b"), "tools": "no JSON"}, "chat.jsonl:1: 'tools' is no valid JSON"),
        ({"messages": conversation("a", "b"), "tools": {"a": 1}}, "'tools' must be a list of objects"),
        ({"messages": "hi"}, r"chat.jsonl:1: 'messages' must be a list of messages .*dataset.messages_field"),
        ({"messages": [{"role": "user"}]}, "must be a list of messages"),
        ({"messages": [{"role": "user", "content": None}]}, "must be a list of messages"),
        ({"text": "hi"}, r"no field 'messages' \(present: text\); set dataset.messages_field"),
    ],
)
def test_what_is_no_conversation_is_named(record, message, tmp_path: Path) -> None:
    (tmp_path / "chat.jsonl").write_text(json.dumps(record))
    with pytest.raises(PhotonError, match=message):
        list(read_documents(str(tmp_path / "chat.jsonl"), CHAT))


TOOL_USE = [
    {"role": "user", "content": "Is it raining?"},
    {"role": "assistant", "tool_calls": [CALL]},
    {"role": "tool", "content": "yes", "tool_call_id": "1"},
    {"role": "assistant", "content": "It is."},
]


@pytest.fixture(params=["jsonl", "parquet"])
def tool_file(request, tmp_path: Path) -> str:
    """Two conversations, with a tool and without; `tools` of a table is JSON, and its messages have all fields."""
    import pyarrow
    import pyarrow.parquet

    jsonl, parquet = tmp_path / "chat.jsonl", tmp_path / "chat.parquet"
    rows = [{"messages": TOOL_USE, "tools": [TOOL]}, {"messages": conversation("a", "b"), "tools": None}]
    jsonl.write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = [{**row, "tools": json.dumps(row["tools"]) if row["tools"] else ""} for row in rows]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), parquet)
    return str(jsonl if request.param == "jsonl" else parquet)


def test_calls_of_tools_are_learned_and_tools_are_written(tool_file: str) -> None:
    """They were dropped: the model learned to answer with an immediate end."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TOOL_TEMPLATE
    documents = list(read_documents(tool_file, CHAT))
    assert documents[0].messages == tuple(TOOL_USE) and documents[0].tools == (TOOL,)
    assert documents[1].messages == tuple(conversation("a", "b")) and documents[1].tools is None
    (_, ids, unlearned), (_, plain, _) = tokenize_chats(documents, tokenizer)
    call = "<call>" + json.dumps(CALL)
    assert tokenizer.decode(ids[~unlearned]) == f"{call}<|end|>It is.<|end|>"
    assert tokenizer.decode(ids).startswith("<tools>" + json.dumps([TOOL]) + "<user>Is it raining?<assistant>")
    assert tokenizer.decode(plain) == "<user>a<assistant>b<|end|>"


@pytest.mark.parametrize(
    ("template", "tools", "message"),
    [
        (TOOL_TEMPLATE.replace("{{ tools | tojson }}", ""), (TOOL,), None),
        (TEMPLATE, None, "c0: the chat template refuses the conversation: .*content"),
        (TOOL_TEMPLATE.replace("<call>{{ call | tojson }}", ""), None, "c0: .* does not write 'tool_calls' as the ass"),
        (
            "{{ messages[1].tool_calls }}" + TOOL_TEMPLATE.replace("<call>{{ call | tojson }}", ""),
            None,
            "does",
        ),
        (TOOL_TEMPLATE.replace("if tools", "if false"), (TOOL,), "c0: .* does not write the record's 'tools'"),
    ],
)
def test_a_template_that_leaves_tools_out_is_refused(template, tools, message) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    documents = [Document("c0", "-", tuple(TOOL_USE), tools)]
    if message is None:
        assert len(list(tokenize_chats(documents, tokenizer))) == 1
        return
    with pytest.raises(PhotonError, match=message):
        list(tokenize_chats(documents, tokenizer))


def test_conversations_read_as_text_point_to_the_setting(tmp_path: Path) -> None:
    with pytest.raises(PhotonError, match="for conversations set dataset.messages_field"):
        list(read_documents(str(chat_file(tmp_path / "chat.jsonl")), DataSettings(text_field="messages")))


def test_a_template_that_marks_nothing_is_refused_and_can_be_replaced(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    with pytest.raises(PhotonError, match="no chat template.*dataset.chat_template"):
        prepare_chat(tokenizer)
    tokenizer.chat_template = UNMARKED
    with pytest.raises(PhotonError, match=r"\{% generation %\} ... \{% endgeneration %\}.*dataset.chat_template"):
        prepare_chat(tokenizer)
    tokenizer.chat_template = {"default": UNMARKED, "tools": UNMARKED}
    with pytest.raises(PhotonError, match="several chat templates"):
        prepare_chat(tokenizer)
    with pytest.raises(PhotonError, match="dataset.chat_template .*nowhere.* cannot be read"):
        prepare_chat(tokenizer, str(tmp_path / "nowhere.jinja"))
    (tmp_path / "marked.jinja").write_text(TEMPLATE)
    prepare_chat(tokenizer, str(tmp_path / "marked.jinja"))
    assert tokenizer.chat_template == {"default": TEMPLATE, "tools": UNMARKED}
    single = byte_tokenizer()
    prepare_chat(single, str(tmp_path / "marked.jinja"))
    assert single.chat_template == TEMPLATE
    turns = conversation("a", "b")
    for found, expected in zip(encode_chat(tokenizer, turns), encode_chat(single, turns), strict=True):
        assert found.tolist() == expected.tolist()


def test_a_conversation_that_the_template_refuses_is_named(tokenizer) -> None:
    strict = byte_tokenizer()
    strict.chat_template = "{{ raise_exception('roles must alternate') }}" + TEMPLATE
    with pytest.raises(PhotonError, match="c0: the chat template refuses the conversation: roles must alternate"):
        pack(chats(conversation("a", "b")), strict, 16, 1, 256, progress=False)
