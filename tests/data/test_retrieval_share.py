"""The share of synthetic retrieval in a training: what its sequences hold, and that they come at any time the same."""

from __future__ import annotations

import re
from itertools import islice

import pytest
import torch
from tiny_tokenizer import word_tokenizer
from tiny_words import TEXT, TOKENIZER, chat_tokenizer

from photon_train.data.loader import batches, sequence_indices
from photon_train.data.mixture import Mixture
from photon_train.data.packing import PackedDataset
from photon_train.data.retrieval_share import RetrievalShare
from photon_train.errors import PhotonError

LENGTH = 1024


def text(rows: int = 6, seq_len: int = LENGTH) -> PackedDataset:
    """Sequences that start at different places of the text, with an end of text in the middle."""
    tokens = torch.stack([TEXT[180 * row :][:seq_len] for row in range(rows)])
    tokens[:, seq_len // 2] = TOKENIZER.eos_token_id
    return PackedDataset(tokens.int(), torch.zeros_like(tokens, dtype=torch.bool), rows)


def share(part: float = 0.25, tokenizer=TOKENIZER, **settings) -> RetrievalShare:
    return RetrievalShare(text(), tokenizer, part, **{"seq_len": LENGTH, "seed": 7, "isolate": True, **settings})


def samples(rows: dict[str, torch.Tensor]):
    """Token ids and labels of each document."""
    for ids, labels, positions in zip(rows["input_ids"], rows["labels"], rows["position_ids"], strict=True):
        starts = [*(positions == 0).nonzero()[:, 0].tolist(), len(ids)]
        for begin, end in zip(starts, starts[1:], strict=False):
            yield ids[begin:end], labels[begin:end]


def test_sequences_hold_all_kinds_of_samples_in_several_lengths() -> None:
    rows = share().batch(torch.arange(60))
    assert rows["input_ids"].shape == rows["labels"].shape == rows["position_ids"].shape == (60, LENGTH)
    found = {"needle": 0, "list": 0, "span": 0}
    lengths = set()
    for ids, labels in samples(rows):
        lengths.add(len(ids))
        assert labels[0] == -100, "no sample predicts the start of the next"
        learned = labels != -100
        assert torch.equal(labels[learned], ids[learned]) and learned.sum() > 0.3 * len(ids)
        assert not (ids == TOKENIZER.eos_token_id).any(), "real text without the marks between documents"
        written = TOKENIZER.decode(ids)
        kind = "span" if "As was written above:" in written else "list" if "Which value does" in written else "needle"
        found[kind] += 1
        if kind == "span":
            continue
        # Every number that is asked for was given before, and the answer is the one that belongs to its key.
        answers = re.findall(r"\? [^?]*? (\d{7})(?=\n|$)", written)
        assert answers and all(written.index(value) < written.rindex(value) for value in answers)
        told = TOKENIZER.decode(ids[learned])
        assert all(told.count(value) == 1 for value in answers), "an answer is learned, what it repeats is not"
    assert lengths == {LENGTH, LENGTH // 2} and min(found.values()) > 20, (lengths, found)


def test_the_same_number_gives_the_same_sequence_in_any_batch() -> None:
    one, again, other = share(), share(), share(seed=8)
    rows = one.batch(torch.tensor([5, 1000, 6]))
    for key, value in again.batch(torch.tensor([1000])).items():
        assert torch.equal(value[0], rows[key][1]), key
    assert not torch.equal(other.batch(torch.tensor([5]))["input_ids"][0], rows["input_ids"][0])
    assert len({tuple(row.tolist()) for row in one.batch(torch.arange(50))["input_ids"]}) == 50


@pytest.mark.parametrize("part", [0.25, 0.1, 1 / 3, 1.0])
def test_the_share_is_spread_evenly_and_all_text_is_read(part: float) -> None:
    dataset, retrieval = text(), share(part, isolate=False)
    known = {tuple(row.tolist()): index for index, row in enumerate(dataset.tokens.long())}
    read = []
    for (batch,) in islice(batches(dataset, 3, 4, retrieval=retrieval), 15):
        read += [known.get(tuple(row.tolist()), -1) for row in batch["input_ids"]]
    made = torch.tensor([index < 0 for index in read]).cumsum(0)
    assert (made - part * torch.arange(1, 61)).abs().max() < 1
    plain = [index for index in read if index >= 0]
    assert plain == sequence_indices(3, len(dataset), 60, 0).tolist()[: len(plain)], "text keeps its order"


def test_the_share_is_exact_however_long_a_training_is() -> None:
    positions = torch.tensor([10**8 - 1, 10**8, 10**8 + 1, 10**12 + 7])
    assert share(0.1, isolate=False).before(positions).tolist() == [10**7 - 1, 10**7, 10**7, 10**11]


def isolated_text() -> PackedDataset:
    dataset = text()
    dataset.starts = torch.zeros_like(dataset.tokens, dtype=torch.bool)
    dataset.starts[:, LENGTH // 2 + 1] = True
    return dataset


@pytest.mark.parametrize("mixed", [False, True])
def test_processes_share_the_sequences_and_a_resumed_run_goes_on_with_them(mixed: bool) -> None:
    dataset = Mixture([isolated_text(), isolated_text()], [1.0, 2.0]) if mixed else isolated_text()
    retrieval = RetrievalShare(dataset, TOKENIZER, 0.3, LENGTH, seed=0, isolate=True)

    def rows(size: int, accumulation: int, rank: int = 0, processes: int = 1, start: int = 0, count: int = 4):
        steps = batches(dataset, 3, size, accumulation, rank, processes, start, retrieval)
        return [{key: torch.cat([micro[key] for micro in step]) for key in step[0]} for step in islice(steps, count)]

    whole = rows(8, 1)
    assert set(whole[0]) == {"input_ids", "labels", "position_ids"}
    for late, step in zip(rows(8, 1, start=2, count=2), whole[2:], strict=True):
        assert all(torch.equal(late[key], step[key]) for key in step), "resumed after two steps"
    ranks = [rows(2, 2, rank, 2) for rank in range(2)]
    for number, step in enumerate(whole):
        divided = torch.cat([rank[number]["input_ids"] for rank in ranks])
        assert sorted(map(tuple, divided.tolist())) == sorted(map(tuple, step["input_ids"].tolist()))
    made = [row for step in whole for row in step["input_ids"] if "?" in TOKENIZER.decode(row)]
    assert len(made) > 5 and len({tuple(row.tolist()) for row in made}) == len(made)


def test_of_conversations_the_assistants_words_and_repetitions_are_learned() -> None:
    tokenizer = chat_tokenizer()
    spoken = 0
    for ids, labels in samples(share(tokenizer=tokenizer, chat=True).batch(torch.arange(30))):
        written, learned = tokenizer.decode(ids), tokenizer.decode(ids[labels != -100])
        if written.startswith("<user>"):
            spoken += 1
            assert learned == "".join(turn.split("<user>")[0] for turn in written.split("<assistant>")[1:])
        else:
            assert "As was written above:" in written and len(learned) > 0
            assert (labels != -100).sum() < len(ids) / 3
    assert spoken > 10


def test_without_isolation_there_are_no_positions_and_samples_start_where_units_do() -> None:
    rows = share(isolate=False, align=512).batch(torch.arange(20))
    assert set(rows) == {"input_ids", "labels"}
    joined = share(isolate=True, align=512).batch(torch.arange(20))
    assert torch.equal(rows["input_ids"], joined["input_ids"])
    assert {len(ids) for ids, _ in samples(joined)} == {LENGTH, 512}


def test_what_cannot_hold_a_question_is_one_clear_error() -> None:
    with pytest.raises(PhotonError, match=r"dataset.retrieval_share: 64 tokens are too few .* train.seq_len to \d+"):
        share(seq_len=64)
    with pytest.raises(PhotonError, match="dataset.retrieval_share asks for numbers and the tokenizer cannot write"):
        share(tokenizer=word_tokenizer())
