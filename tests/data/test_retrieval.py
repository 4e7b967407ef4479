"""What synthetic retrieval sequences hold: real text, needles at spread depths, and the right answers at the end."""

from __future__ import annotations

import re

import pytest
import torch
from tiny_words import TEXT, TOKENIZER, chat_tokenizer

from photon_train.data.retrieval import (
    TEMPLATES,
    list_sample,
    needle_sample,
    needle_sequences,
    periodic_sequences,
    plain_text,
    span_sample,
)
from photon_train.errors import PhotonError


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def stated(text: str) -> dict[str, str]:
    """Every key and number that statements in `text` give."""
    found = {}
    for statement, *_ in TEMPLATES:
        pattern = re.escape(statement).replace(r"\{key\}", "(?P<key>[a-z]+ [a-z]+)").replace(r"\{value\}", r"(\d{7})")
        found |= {match["key"]: match[2] for match in re.finditer(pattern, text)}
    return found


def test_periodic_sequences_repeat_a_span_of_the_text() -> None:
    rows = periodic_sequences(TEXT, 5, 100, 30, seeded())
    assert rows.shape == (5, 100) and rows.dtype == torch.long
    assert torch.equal(rows[:, 30:], rows[:, :-30])
    spans = TEXT.unfold(0, 30, 1)
    assert all((spans == row[:30]).all(1).any() for row in rows)
    assert len({tuple(row.tolist()) for row in rows}) == 5
    with pytest.raises(PhotonError, match="period of 30"):
        periodic_sequences(TEXT[:29], 1, 100, 30, seeded())


def test_a_needle_is_asked_for_at_the_end_and_its_answer_is_right() -> None:
    ids, mask = needle_sequences(TEXT, TOKENIZER, 20, 512, seeded())
    assert ids.shape == mask.shape == (20, 512) and mask.dtype == torch.bool
    assert mask[:, -1].all(), "the answer comes last"
    for row, answer in zip(ids, mask, strict=True):
        text = TOKENIZER.decode(row)
        ((key, value),) = stated(text).items()
        assert TOKENIZER.decode(row[answer]).strip() == value
        asked = text[text.rindex("?") - 60 :]
        assert key in asked and text.count(value) == 2
        first = int(answer.nonzero()[0])
        assert answer[first:].all(), "the answer is one piece"


def test_needles_stand_at_all_depths_but_the_last_eighth() -> None:
    ids, _ = needle_sequences(TEXT, TOKENIZER, 200, 512, seeded(1))
    texts = [TOKENIZER.decode(row) for row in ids]
    places = [len(TOKENIZER(text[: text.index(next(iter(stated(text).values())))])["input_ids"]) for text in texts]
    depths = torch.tensor(places) / 512
    assert depths.max() < 7 / 8 + 30 / 512 and depths.min() < 0.12
    counts = torch.histc(depths, bins=7, min=0.03, max=0.87)
    assert counts.min() >= 200 / 7 / 2.5, counts


def test_no_needle_of_a_long_text_is_near_its_end() -> None:
    """Where the questions are short beside the last eighth."""
    ids, _ = needle_sequences(TEXT, TOKENIZER, 40, 2048, seeded(1))
    for text in map(TOKENIZER.decode, ids):
        (value,) = stated(text).values()
        assert len(TOKENIZER(text[: text.index(value)])["input_ids"]) < 7 / 8 * 2048 + 30


def test_the_rest_is_real_text_without_special_tokens() -> None:
    end = TOKENIZER.eos_token_id
    broken = torch.cat([TEXT[:500], torch.tensor([end]), TEXT[500:], torch.tensor([end, end])])
    assert torch.equal(plain_text(broken, TOKENIZER), TEXT)
    ids, _ = needle_sequences(broken, TOKENIZER, 4, 512, seeded())
    assert not (ids == end).any()
    with pytest.raises(PhotonError, match="no text"):
        plain_text(torch.tensor([end]), TOKENIZER)


def test_several_needles_have_different_keys_and_every_one_is_asked_for() -> None:
    sample = needle_sample(TEXT, TOKENIZER, 1024, seeded(), needles=4)
    text, answers = TOKENIZER.decode(sample.ids), TOKENIZER.decode(sample.ids[sample.answers]).split()
    facts = stated(text)
    assert len(facts) == 4 and sorted(answers) == sorted(facts.values())
    # Nothing is learned where the numbers are first given: nobody could know them.
    assert all(value not in TOKENIZER.decode(sample.ids[sample.learned & ~sample.answers]) for value in answers)
    assert sample.learned.float().mean() > 0.5, "real text is learned"


def test_a_list_is_asked_about_in_another_order() -> None:
    sample = list_sample(TEXT, TOKENIZER, 1024, seeded(), records=12, questions=5)
    text = TOKENIZER.decode(sample.ids)
    facts = dict(re.findall(r"([a-z]+ [a-z]+): (\d{7})\n", text))
    assert len(facts) == 12
    answers = TOKENIZER.decode(sample.ids[sample.answers]).split()
    asked = re.findall(r"list give for ([a-z]+ [a-z]+)\?", text)
    assert len(set(asked)) == 5 and [facts[key] for key in asked] == answers


def test_spans_come_again() -> None:
    sample = span_sample(TEXT, TOKENIZER, 512, seeded(), spans=2)
    assert len(sample.ids) == len(sample.answers) == 512 and sample.answers.any()
    text = TOKENIZER.decode(sample.ids)
    assert text.count("As was written above:") == 2
    edges = (sample.answers.int().diff() != 0).nonzero()[:, 0] + 1
    starts = [int(edge) for edge in edges if sample.answers[edge]]
    for start in starts:
        stop = next((int(edge) for edge in edges if edge > start), 512)
        span = sample.ids[start - 4 : stop]
        earlier = sample.ids[: start - 4].unfold(0, len(span), 1)
        assert len(span) >= 16 and (earlier == span).all(1).any()
    only = span_sample(TEXT, TOKENIZER, 512, seeded(), spans=2, only_answers=True)
    assert torch.equal(only.ids, sample.ids) and torch.equal(only.learned, sample.answers)


@pytest.mark.parametrize("seed", range(8))
def test_a_span_has_been_read_whole_before_it_comes_again(seed: int) -> None:
    """In a text without any other repetition."""
    sample = span_sample(torch.arange(10_000, 11_000), TOKENIZER, 512, seeded(seed), spans=1)
    first, last = (int(place) for place in sample.answers.nonzero()[[0, -1], 0])
    span = sample.ids[first - 4 : last + 1]
    assert len(span) >= 16 and set(span.tolist()) <= set(sample.ids[: first - 4].tolist())


def test_in_a_conversation_the_user_gives_the_text_and_the_assistant_answers() -> None:
    tokenizer = chat_tokenizer()
    sample = needle_sample(TEXT, tokenizer, 768, seeded(), needles=2, chat=True)
    text = tokenizer.decode(sample.ids)
    assert len(sample.ids) == 768 and text.startswith("<user>") and text.count("<assistant>") == 2
    learned = tokenizer.decode(sample.ids[sample.learned])
    said = [turn.split("<user>")[0] for turn in text.split("<assistant>")[1:]]
    assert learned == "".join(said), "what the assistant says is learned, and nothing else"
    facts = stated(text)
    assert sorted(re.findall(r"\d{7}", learned)) == sorted(facts.values())


def test_the_generator_decides() -> None:
    one, same, other = (needle_sequences(TEXT, TOKENIZER, 3, 256, seeded(seed))[0] for seed in (3, 3, 4))
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_a_length_that_holds_no_question_is_an_error() -> None:
    with pytest.raises(PhotonError, match="40 tokens are too few"):
        needle_sequences(TEXT, TOKENIZER, 1, 40, seeded())
    with pytest.raises(PhotonError, match="too few to repeat"):
        span_sample(TEXT, TOKENIZER, 64, seeded(), spans=2)
