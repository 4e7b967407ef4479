"""Tokenised corpora: the same sequences as packing in memory, however often the writing was stopped."""

from __future__ import annotations

import json
import os
import re
import signal
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_chat import TEMPLATE, chat_file
from tiny_checkpoint import byte_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from photon_train.config import DataSettings
from photon_train.data import tokenised
from photon_train.data.corpora import read_documents, split_documents
from photon_train.data.packing import pack
from photon_train.data.tokenised import Corpus, CorpusDataset, is_corpus, write_corpus
from photon_train.errors import PhotonError


def make_tokenizer():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


TOKENIZER = make_tokenizer()
END = TOKENIZER.eos_token_id


@pytest.fixture
def source(tmp_path: Path) -> str:
    """Two shards of JSONL with short, empty and very long documents."""
    (tmp_path / "text").mkdir()
    for shard in range(2):
        texts = ["", "x", "long " * 60, *(f"document {shard}.{i} " * (i % 4 + 1) for i in range(20))]
        lines = [json.dumps({"text": text}) for text in texts]
        (tmp_path / "text" / f"{shard}.jsonl").write_text("\n".join(lines))
    return str(tmp_path / "text")


def write(source: str, directory: Path, per_shard: int = 7, **settings) -> Corpus:
    write_corpus(source, DataSettings(**settings), TOKENIZER, directory, documents_per_shard=per_shard)
    return Corpus(directory, TOKENIZER)


def content(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("seq_len", "align"), [(16, 1), (4096, 1), (48, 16), (4096, 16)])
@pytest.mark.parametrize("chat", [False, True])
def test_sequences_are_those_of_packing_in_memory(source, seq_len, align, chat, tmp_path: Path) -> None:
    settings = {"messages_field": "messages"} if chat else {}
    if chat:
        source = str(chat_file(tmp_path / "chat.jsonl"))
    corpus = write(source, tmp_path / "corpus", **settings)
    sides = split_documents(read_documents(source, DataSettings(**settings)), 0.2)
    for documents, chosen, pad_last in zip(sides, corpus.split(0.2), (False, True), strict=True):
        isolate = align == 1
        expected = pack(documents, TOKENIZER, seq_len, align, END, pad_last=pad_last, isolate=isolate, progress=False)
        mapped = CorpusDataset(corpus, chosen, seq_len, align, END, pad_last, isolate)
        assert ("position_ids" in mapped.batch(torch.tensor([0]))) == isolate
        assert len(mapped) == len(expected) and mapped.num_documents == expected.num_documents
        assert mapped.num_tokens == expected.num_tokens
        assert mapped.packing_efficiency == pytest.approx(expected.packing_efficiency)
        order = torch.randperm(len(mapped))
        for key, value in expected.batch(order).items():
            assert torch.equal(mapped.batch(order)[key], value), key


def test_tokens_stay_on_disk_in_the_smallest_type(source, tmp_path: Path, monkeypatch) -> None:
    corpus = write(source, tmp_path / "corpus")
    assert all(isinstance(shard, np.memmap) and shard.dtype == np.uint16 for shard in corpus.tokens)
    assert is_corpus(str(tmp_path / "corpus")) and not is_corpus(source) and not is_corpus(None)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert is_corpus("~/corpus")


@pytest.mark.parametrize(("largest", "dtype"), [(2**16 - 1, "uint16"), (2**16, "uint32")])
def test_sixteen_bits_hold_ids_up_to_65535(largest: int, dtype: str, monkeypatch) -> None:
    monkeypatch.setattr(tokenised, "largest_id", lambda tokenizer: largest)
    assert tokenised._dtype(TOKENIZER) == dtype


def test_documents_beyond_the_last_whole_sequence_count_nothing() -> None:
    """Of 6, 5 and 3 tokens a sequence of 8 holds the first and 2 of the second."""
    dataset = CorpusDataset(SimpleNamespace(lengths=np.array([6, 5, 3])), np.arange(3), 8, 1, END)
    assert (len(dataset), dataset.num_tokens, dataset.packing_efficiency) == (1, 8, 1.0)


def test_few_tokens_with_large_ids_are_kept(source, tmp_path: Path) -> None:
    """The type was chosen by their number: an id of 70,000 became 4,464."""
    vocabulary = {"<unk>": 0, "document": 70_000, "x": 65_536}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<unk>")
    directory = tmp_path / "corpus"
    write_corpus(source, DataSettings(), tokenizer, directory)
    tokens = Corpus(directory, tokenizer).tokens[0]
    assert set(tokens.tolist()) == set(vocabulary.values())
    file = directory / "shard-00000" / "shard.json"
    file.write_text(file.read_text().replace('"uint32"', '"uint16"'))
    with pytest.raises(PhotonError, match=r"tokens.bin holds ids as uint16, which .* do not fit: .*tokenise again"):
        Corpus(directory, tokenizer)


def test_workers_and_interruptions_change_no_byte(source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(source, tmp_path / "straight")
    write(source, tmp_path / "workers", num_workers=2)
    assert content(tmp_path / "workers") == content(tmp_path / "straight")
    write_shard, written = tokenised._write_shard, []

    def stopped(path, *arguments):
        if path.name == "shard-00003" and len(written) < 4:
            (path.parent / ".shard-00003.0123456789ab").mkdir()
            raise KeyboardInterrupt
        written.append(path.name)
        return write_shard(path, *arguments)

    monkeypatch.setattr(tokenised, "_write_shard", stopped)
    with pytest.raises(KeyboardInterrupt):
        write(source, tmp_path / "again")
    with pytest.raises(PhotonError, match="again is not complete"):
        Corpus(tmp_path / "again", TOKENIZER)
    written += [""] * 4
    write(source, tmp_path / "again")
    assert written[:3] + written[7:] == [f"shard-{i:05d}" for i in range(len(written) - 4)]
    assert content(tmp_path / "again") == content(tmp_path / "straight")
    count = len(written)
    write(source, tmp_path / "again")
    assert len(written) == count, "a complete corpus is left as it is"


def _die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_dies_is_one_error(source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(source, tmp_path / "corpus", max_documents=7)
    monkeypatch.setattr(tokenised, "_write_shard", _die)
    with pytest.raises(
        PhotonError, match=r"tokenised into .*died .*dataset.num_workers.*finished shards are kept"
    ) as e:
        write(source, tmp_path / "other", num_workers=1)
    assert "\n" not in str(e.value)


def test_a_truncated_shard_is_named(source, tmp_path: Path) -> None:
    write(source, tmp_path / "corpus")
    file = tmp_path / "corpus" / "shard-00001" / "tokens.bin"
    file.write_bytes(file.read_bytes()[:-2])
    with pytest.raises(PhotonError, match=r"shard-00001/tokens.bin has \d+ bytes instead of \d+: .*tokenise again"):
        Corpus(tmp_path / "corpus", TOKENIZER)
    file.unlink()
    with pytest.raises(PhotonError, match="tokens.bin is missing"):
        Corpus(tmp_path / "corpus", TOKENIZER)


def test_a_disk_that_fills_is_one_error_and_costs_no_finished_shard(source, tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk: writing fails in the middle of a shard."""
    import resource

    write(source, tmp_path / "straight")
    size = (tmp_path / "straight" / "shard-00001" / "tokens.bin").stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    directory, said = tmp_path / "corpus", []

    def fill(line: str) -> None:
        said.append(line)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, limits[1]))

    tokenise = partial(write_corpus, source, DataSettings(), TOKENIZER, directory, documents_per_shard=7)
    try:
        with pytest.raises(PhotonError, match="corpus cannot be written: .*finished shards are kept"):
            tokenise(progress=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert said and all(path.name.startswith("shard-") for path in directory.iterdir()), "nothing half-written"
    tokenise()
    assert content(directory) == content(tmp_path / "straight")


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet"])
def test_a_truncated_source_is_one_error_and_costs_no_finished_shard(kind, tmp_path: Path) -> None:
    import gzip

    import pyarrow
    import pyarrow.parquet

    texts = [f"document {i} {'abcdefghij'[i % 10] * 30}" for i in range(40)]
    path = tmp_path / f"texts.{kind}"
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path)
    else:
        raw = "\n".join(json.dumps({"text": text}) for text in texts).encode()
        path.write_bytes(gzip.compress(raw) if kind.endswith("gz") else raw)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(PhotonError, match=rf"texts.{kind}.*") as caught:
        write(str(path), tmp_path / "corpus")
    assert "\n" not in str(caught.value) and not (tmp_path / "corpus" / "corpus.json").exists()


def test_other_settings_or_another_tokenizer_are_refused(source, tmp_path: Path) -> None:
    write(source, tmp_path / "corpus")
    with pytest.raises(PhotonError, match="corpus was made with another max_documents: give another directory"):
        write(source, tmp_path / "corpus", max_documents=3)
    with open(Path(source) / "0.jsonl", "a") as file:
        file.write('\n{"text": "more"}')
    with pytest.raises(PhotonError, match="another source_content"):
        write(source, tmp_path / "corpus")
    other = make_tokenizer()
    other.chat_template = TEMPLATE + " "
    with pytest.raises(PhotonError, match="another tokenizer or chat template"):
        Corpus(tmp_path / "corpus", other)


def test_other_text_of_equal_size_is_refused_and_makes_another_corpus(source, tmp_path: Path, monkeypatch) -> None:
    """Bytes were counted, and the documents of finished shards compared by name."""
    first = write(source, tmp_path / "corpus")
    chosen, _ = first.split(0.2)
    dataset = partial(CorpusDataset, documents=chosen, seq_len=16, align=1, pad_id=END)
    file = Path(source) / "0.jsonl"
    text = file.read_text()
    file.write_text(text)  # the same at another time
    os.utime(file, (1, 1))
    write(source, tmp_path / "corpus")
    (tmp_path / "corpus" / "corpus.json").rename(tmp_path / "kept.json")
    file.write_text(text.replace("document 0.1 ", "document 0.9 "))
    with pytest.raises(PhotonError, match="another source_content"):
        write(source, tmp_path / "corpus")
    monkeypatch.setattr(tokenised, "source_hash", lambda _: json.loads(kept.read_text())["made_of"]["source_content"])
    kept = tmp_path / "kept.json"  # as of a hub data set, whose files nobody hashes
    again = write(source, tmp_path / "corpus")
    tokens = [np.concatenate(corpus.tokens) for corpus in (first, again)]
    assert len(tokens[0]) == len(tokens[1]) and dataset(first).content_hash() != dataset(again).content_hash()
    assert not np.array_equal(*tokens)


def test_the_hash_of_a_corpus_is_that_of_its_documents(source, tmp_path: Path) -> None:
    corpora = [write(source, tmp_path / "one"), write(source, tmp_path / "two", num_workers=0)]
    sides = [corpus.split(0.2) for corpus in corpora]
    hashes = {
        CorpusDataset(corpus, side, 16, 1, END).content_hash()
        for corpus, both in zip(corpora, sides, strict=True)
        for side in both
    }
    assert len(hashes) == 2


def test_nothing_to_learn(tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "hi"}]}
    (tmp_path / "chat.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row))
    with pytest.raises(PhotonError, match="no document has anything to learn"):
        write(str(tmp_path / "chat.jsonl"), tmp_path / "corpus", messages_field="messages")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("corpus.json", b"[1]", "has no usable 'made_of'"),
        ("corpus.json", b'{"made_of": {}}', "has no usable 'shards'"),
        ("corpus.json", b"{", "cannot be read"),
        ("shard-00000/shard.json", b'{"sizes": 3}', "has no usable 'sizes'"),
        ("shard-00000/offsets.npy", None, "offsets.npy cannot be read"),
        ("shard-00000/points.npy", np.zeros(2), "points.npy does not fit offsets.npy"),
        ("shard-00000/offsets.npy", np.asarray([0, 7], np.int64), "offsets.npy does not fit tokens.bin"),
        ("shard-00000/offsets.npy", np.zeros((2, 2), np.int64), "offsets.npy is no vector"),
        ("shard-00000/points.npy", np.asarray(["a"], object), "points.npy cannot be read"),
    ],
)
def test_a_damaged_corpus_is_one_line_that_says_what_to_remove(source, tmp_path, name, content, said) -> None:
    """Of the size that was written, so that the sizes do not tell."""
    write(source, tmp_path / "corpus")
    path = tmp_path / "corpus" / name
    if isinstance(content, np.ndarray):
        np.save(path, content, allow_pickle=True)
    else:
        path.write_bytes(path.read_bytes()[::-1] if content is None else content)
    if path.suffix == ".npy":
        shard = path.with_name("shard.json")
        record = json.loads(shard.read_text())
        record["sizes"][path.name] = path.stat().st_size
        shard.write_text(json.dumps(record))
    with pytest.raises(PhotonError, match=f"{re.escape(said)}.*: remove .*tokenise again") as caught:
        Corpus(tmp_path / "corpus", make_tokenizer())
    assert "\n" not in str(caught.value)
    if name == "corpus.json":
        with pytest.raises(PhotonError, match=f"{re.escape(said)}.*tokenise again"):
            write(source, tmp_path / "corpus")
