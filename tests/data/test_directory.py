"""What of a directory is read, and that what is not is said; files that break off in the middle."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from photon_train.config import DataSettings
from photon_train.data.corpora import data_files, read_documents, split_documents
from photon_train.data.directory import survey
from photon_train.errors import PhotonError


def make(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text('{"text": "x"}\n')
    return root


def names(root: Path) -> list[str]:
    return [path.relative_to(root).as_posix() for path in data_files(root)]


def test_everything_is_read_or_named_with_its_reason(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = make(tmp_path / "texts", "a.jsonl", "b.txt", "c.jsonl.zst", "d.txt.gz", "e.json", "f.png", "g.png", "h")
    make(root, ".git/config", ".hidden.txt", "sub/i.txt")
    make(tmp_path, "elsewhere/j.txt")
    (root / "link").symlink_to(tmp_path / "elsewhere")
    (root / "gone.txt").symlink_to(tmp_path / "nowhere")
    os.mkfifo(root / "pipe.txt")
    documents = list(read_documents(str(root), DataSettings()))
    assert [document.name for document in documents] == ["a.jsonl:1", "b.txt", "sub/i.txt"]
    (line,) = caplog.messages
    assert line.startswith(f"{root}: 3 files are read (2 .txt, 1 .jsonl); left out: ")
    for part in (
        "2 compressed in a way that is not read (decompress them): c.jsonl.zst, d.txt.gz",
        "1 .json, which may hold anything (rename to .jsonl where each line is an object): e.json",
        "3 of other kinds: 2 .png, 1 without a suffix",
        "2 hidden: .git, .hidden.txt",
        "1 links to directories (give what they point to as sources): link",
        "2 links to nothing, pipes and the like: gone.txt, pipe.txt",
    ):
        assert part in line
    found = survey(root)
    assert len(found.read) + sum(map(len, found.left_out.values())) == 14


def test_processes_other_than_the_first_are_silent(tmp_path: Path, caplog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    list(read_documents(str(make(tmp_path, "a.txt", "b.png")), DataSettings()))
    assert not caplog.messages


def test_files_of_one_kind_are_nothing_to_speak_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    list(read_documents(str(make(tmp_path, "a.txt", "b.txt")), DataSettings()))
    assert not caplog.messages
    make(tmp_path, "README.md")
    list(read_documents(str(tmp_path), DataSettings()))
    assert "3 files are read (2 .txt, 1 .md)" in caplog.text


def test_names_are_written_on_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make(tmp_path, "a.txt", "b\n.json")
    (tmp_path / os.fsdecode(b"c\xff.txt")).write_text("a name that is not UTF-8")
    documents = list(read_documents(str(tmp_path), DataSettings()))
    assert len(documents) == 2 and all(split_documents(documents, 0.5))
    assert caplog.messages[0].encode() and "\n" not in caplog.messages[0] and r"b\n.json" in caplog.messages[0]


def test_a_readme_is_text_among_texts_and_not_beside_rows(tmp_path: Path) -> None:
    assert names(make(tmp_path / "texts", "README.md", "a.md")) == ["README.md", "a.md"]
    assert names(make(tmp_path / "rows", "README.md", "data/a.jsonl", "notes.md")) == ["data/a.jsonl", "notes.md"]
    assert "tell about the rows" in str(survey(tmp_path / "rows"))


@pytest.mark.parametrize(
    ("found", "read"),
    [
        (["train/a.txt", "test/b.txt", "valid/c.txt", "more/d.txt"], ["more/d.txt", "train/a.txt"]),
        (["train.jsonl", "test.jsonl", "dev.jsonl.gz"], ["train.jsonl"]),
        (["data/train-00000-of-00002.parquet", "data/validation-00000-of-00001.parquet"], None),
        (["a.jsonl", "test.jsonl"], ["a.jsonl", "test.jsonl"]),
        (["train.py", "test.py"], ["test.py", "train.py"]),
        (["train/a.txt", "other/test/b.txt", "testing_ground.txt"], None),
    ],
)
def test_other_splits_beside_train_are_not_trained_on(found, read, tmp_path: Path) -> None:
    make(tmp_path, *found)
    if read is None:
        read = sorted(found) if "other/test/b.txt" in found else found[:1]
    assert names(tmp_path) == read
    left_out = survey(tmp_path).left_out
    assert bool(left_out) == (len(read) < len(found)) and all("another split" in reason for reason in left_out)


def refusal(path: Path, **settings) -> str:
    with pytest.raises(PhotonError) as caught:
        list(read_documents(str(path), DataSettings(**settings)))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("given", ["file", "directory"])
def test_a_bad_byte_among_rows_is_fatal_and_has_a_line(given: str, tmp_path: Path) -> None:
    """Of a directory, the rows before it were used and the warning said that the file was left out."""
    lines = [json.dumps({"text": f"row {i}"}).encode() for i in range(1000)]
    lines[499] = b'{"text": "caf\xe9"}'
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    source = tmp_path if given == "directory" else tmp_path / "a.jsonl"
    assert f"{tmp_path / 'a.jsonl'}:500: not UTF-8 text (byte 13 of the line)" in refusal(source)


def test_damage_inside_of_gzip_is_one_error(tmp_path: Path) -> None:
    """zlib has errors of its own."""
    whole = gzip.compress("".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(1000)).encode())
    path, messages = tmp_path / "a.jsonl.gz", set()
    for place in range(10, len(whole), 97):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :])
        try:
            list(read_documents(str(path), DataSettings()))
        except PhotonError as error:
            messages.add(str(error))
    assert any("invalid" in message for message in messages)
    assert all(message.startswith(str(path)) and "\n" not in message for message in messages)


def test_compressed_text_is_refused_at_once(tmp_path: Path) -> None:
    for name in ("a.jsonl.zst", "a.txt.gz"):
        (tmp_path / name).write_bytes(b"\x28\xb5\x2f\xfd")
        with pytest.raises(PhotonError, match=rf"{name}: decompress it"):
            read_documents(str(tmp_path / name), DataSettings())


@pytest.mark.parametrize("line", ["[" * 100_000, '{"text": ' + "1" * 5000 + "}"])
def test_json_that_python_cannot_read_is_one_error(line: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(line)
    assert "a.jsonl:1: JSON that cannot be read: " in refusal(tmp_path / "a.jsonl")


def test_keys_are_written_on_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"a\\nb\\ud800": 1}')
    assert refusal(tmp_path / "a.jsonl").encode().count(b"\\") == 2


def test_empty_documents_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{"text": null}\n{"text": " "}\n')
    assert len(list(read_documents(str(tmp_path / "a.jsonl"), DataSettings()))) == 1
    assert f"{tmp_path / 'a.jsonl'}: 2 of 3 documents are empty and left out" in caplog.text


@pytest.mark.parametrize("chat", [False, True])
def test_parquet_whose_text_is_not_utf8_is_one_error(chat: bool, tmp_path: Path) -> None:
    said = [{"role": "user", "content": "caf\u00e9"}] if chat else "caf\u00e9"
    table = pyarrow.table({"messages" if chat else "text": [said] * 3})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", compression="none", use_dictionary=False)
    raw = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(raw.replace("caf\u00e9".encode(), b"caf\xe9!"))
    message = refusal(tmp_path / "a.parquet", messages_field="messages" if chat else None)
    assert "a.parquet: cannot be read as Parquet from row 0 on: 'utf-8' codec can't decode byte 0xe9" in message
