"""Packing: alignment, labels, round trip, odd lengths; and the vocabulary check."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors

from photon_train.data import packing
from photon_train.data.corpora import Document
from photon_train.data.packing import pack
from photon_train.data.pretrain import train_tokenizer
from photon_train.data.tokenizers import check_tokenizer
from photon_train.errors import PhotonError

TEXTS = ["def f(x):\n    return x\n", "grüße 🎈\n\n", "x", "a much longer text with many words " * 5]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(iter(TEXTS * 3), 300)


def documents(texts: list[str]) -> list[Document]:
    return [Document(f"d{i}", text) for i, text in enumerate(texts)]


def real_tokens(dataset: packing.PackedDataset) -> list[int]:
    """What is left of all sequences without filler."""
    rows = dataset.batch(torch.arange(len(dataset)))
    return rows["labels"][rows["labels"] != -100].tolist()


# One tokenizer for all examples: `given` does not mix with module fixtures of other scopes.
TOKENIZER = train_tokenizer(iter(TEXTS * 3), 300)
EOS = TOKENIZER.eos_token_id


@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(st.text(min_size=1, max_size=60), min_size=1, max_size=12),
    align=st.sampled_from([1, 2, 3, 4, 16]),
    multiple=st.integers(1, 5),
)
def test_nothing_is_lost_and_every_document_starts_on_a_boundary(texts: list[str], align: int, multiple: int) -> None:
    dataset = pack(documents(texts), TOKENIZER, align * multiple, align, EOS, pad_last=True, progress=False)
    expected = [[*TOKENIZER(text)["input_ids"], EOS] for text in texts]
    assert real_tokens(dataset) == sum(expected, [])
    assert TOKENIZER.decode(real_tokens(dataset)) == "".join(text + "<|endoftext|>" for text in texts)
    flat = dataset.tokens.flatten().tolist()
    labels = dataset.batch(torch.arange(len(dataset)))["labels"].flatten().tolist()
    start = 0
    for ids in expected:
        assert start % align == 0
        assert flat[start : start + len(ids)] == ids == labels[start : start + len(ids)]
        gap = -len(ids) % align
        start += len(ids) + gap
        assert labels[start - gap : start] == [-100] * gap and set(flat[start - gap : start]) <= {EOS}
    assert labels[start:] == [-100] * (len(labels) - start) and len(labels) - start < align * multiple
    assert dataset.num_tokens == len(real_tokens(dataset)) and dataset.num_documents == len(texts)
    assert dataset.packing_efficiency == pytest.approx(dataset.num_tokens / len(flat))


def test_shapes_and_types(tokenizer) -> None:
    dataset = pack(documents(TEXTS), tokenizer, 16, 4, EOS, progress=False)
    assert dataset.tokens.dtype == torch.int32
    item, rows = dataset[1], dataset.batch(torch.tensor([1, 0]))
    assert item["input_ids"].shape == item["labels"].shape == (16,) and rows["labels"].shape == (2, 16)
    assert item["input_ids"].dtype == item["labels"].dtype == torch.int64
    assert torch.equal(rows["labels"][0], item["labels"]) and torch.equal(rows["input_ids"][0], item["input_ids"])
    assert len(list(dataset)) == len(dataset)


def test_without_alignment_documents_follow_each_other(tokenizer) -> None:
    dataset = pack(documents(TEXTS), tokenizer, 7, 1, EOS, progress=False)
    expected = sum(([*tokenizer(text)["input_ids"], EOS] for text in TEXTS), [])
    assert dataset.filler is None and dataset.packing_efficiency == 1.0
    assert dataset.tokens.flatten().tolist() == expected[: len(expected) // 7 * 7]


def test_last_sequence_is_dropped_for_training_and_kept_for_evaluation(tokenizer) -> None:
    training = pack(documents(TEXTS), tokenizer, 16, 1, EOS, progress=False)
    evaluation = pack(documents(TEXTS), tokenizer, 16, 1, EOS, pad_last=True, progress=False)
    assert len(evaluation) == len(training) + 1
    assert torch.equal(evaluation.tokens[:-1], training.tokens)
    assert (evaluation[-1]["labels"] == -100).any() and (evaluation[-1]["labels"] != -100).any()


def test_less_than_one_sequence_is_filled_up(tokenizer) -> None:
    dataset = pack(documents(["x"]), tokenizer, 64, 16, EOS, progress=False)
    assert len(dataset) == 1 and dataset.num_tokens == 2
    assert dataset[0]["labels"].tolist() == [*tokenizer("x")["input_ids"], EOS] + [-100] * 62


def test_pad_id_stands_on_filler_only(tokenizer) -> None:
    dataset = pack(documents(TEXTS), tokenizer, 16, 16, EOS, pad_id=7, progress=False)
    row = dataset.batch(torch.arange(len(dataset)))
    assert set(row["input_ids"][row["labels"] == -100].tolist()) == {7}


def test_long_document_is_tokenised_in_pieces(tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "".join(f"line {i}\n" for i in range(50)) + "y" * 300
    monkeypatch.setattr(packing, "_PIECE_CHARACTERS", 100)
    dataset = pack(documents([text, "z"]), tokenizer, 32, 16, EOS, pad_last=True, progress=False)
    assert tokenizer.decode(real_tokens(dataset)) == text + "<|endoftext|>z<|endoftext|>"
    assert dataset.num_documents == 2
    pieces = list(packing._pieces(text))
    assert max(map(len, pieces)) == 100 and "".join(pieces) == text
    # Cut after line ends; only what has none within reach is cut anywhere.
    assert {piece.endswith("\n") for piece in pieces if "y" not in piece} == {True}


def test_few_characters_are_tokenised_at_once(tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A document of 50 MB took gigabytes; which pieces go together changes no token."""
    texts = ["".join(f"line {i} of {name}\n" for i in range(40)) for name in "abc"] + ["short", "x" * 250]
    monkeypatch.setattr(packing, "_PIECE_CHARACTERS", 100)
    expected = [ids.tolist() for _, ids, _ in packing.tokenize_documents(documents(texts), tokenizer, EOS)]
    sizes: list[int] = []

    class Seen(type(tokenizer)):
        def __call__(self, text, **settings):
            sizes.append(sum(map(len, text)))
            return super().__call__(text, **settings)

    monkeypatch.setattr(tokenizer, "__class__", Seen)
    monkeypatch.setattr(packing, "_CHARACTERS_AT_ONCE", 250)
    found = [ids.tolist() for _, ids, _ in packing.tokenize_documents(documents(texts), tokenizer, EOS)]
    assert found == expected and max(sizes) < 250 + 100 and sum(sizes) == sum(map(len, texts))


def test_documents_start_with_bos_where_the_tokenizer_puts_one() -> None:
    tokenizer = train_tokenizer(iter(TEXTS), 300)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    bos = tokenizer.bos_token_id
    assert bos not in real_tokens(pack(documents(["x", "y"]), tokenizer, 8, 4, EOS, progress=False))
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", bos)]
    )
    dataset = pack(documents(["x", "y"]), tokenizer, 8, 4, EOS, progress=False)
    x, y = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in "xy")
    assert real_tokens(dataset) == [bos, *x, EOS, bos, *y, EOS]


def test_sequence_length_must_fit_the_units(tokenizer) -> None:
    with pytest.raises(PhotonError, match=r"train.seq_len = 50 .*16 tokens under a unit: take 48"):
        pack(documents(TEXTS), tokenizer, 50, 16, EOS, progress=False)
    for seq_len, align in ((0, 1), (-4, 4), (16, 0)):
        with pytest.raises(PhotonError, match=f"train.seq_len = {seq_len} "):
            pack(documents(TEXTS), tokenizer, seq_len, align, EOS, progress=False)


def test_no_documents(tokenizer) -> None:
    with pytest.raises(PhotonError, match="no text to pack"):
        pack([], tokenizer, 16, 1, EOS, progress=False)


def test_vocabulary_mismatch_names_both_numbers(tokenizer, tmp_path: Path) -> None:
    check_tokenizer(tokenizer, 300)
    with pytest.raises(PhotonError, match="ids up to 299 .* vocab_size is 299"):
        check_tokenizer(tokenizer, 299)


@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(st.text(min_size=1, max_size=40), min_size=1, max_size=12),
    seq_len=st.integers(2, 40),
    pad_last=st.booleans(),
)
def test_isolated_documents_count_positions_from_their_start(texts: list[str], seq_len: int, pad_last: bool) -> None:
    """A document starts anew where it was cut; no label asks one to predict the start of the next."""
    together = pack(documents(texts), TOKENIZER, seq_len, 1, EOS, pad_last=pad_last, progress=False)
    apart = pack(documents(texts), TOKENIZER, seq_len, 1, EOS, pad_last=pad_last, isolate=True, progress=False)
    rows, old = (dataset.batch(torch.arange(len(dataset))) for dataset in (apart, together))
    assert set(old) == {"input_ids", "labels"} and torch.equal(rows["input_ids"], old["input_ids"])
    starts = sum(([True] + [False] * len(TOKENIZER(text)["input_ids"]) for text in texts), [])
    starts += ([True] + [False] * seq_len)[: max(0, rows["labels"].numel() - len(starts))]
    positions = [0]
    for number in range(1, rows["labels"].numel()):
        positions.append(0 if starts[number] or number % seq_len == 0 else positions[-1] + 1)
    positions = torch.tensor(positions).view(-1, seq_len)
    assert torch.equal(rows["position_ids"], positions)
    expected = old["labels"].masked_fill(positions == 0, -100)
    assert torch.equal(rows["labels"], expected)
