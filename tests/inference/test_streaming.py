"""Text as it comes, stop texts, and what `stream` yields."""

from __future__ import annotations

import pytest
from tiny import photon_model, tokens
from tiny_checkpoint import byte_tokenizer
from tiny_tokenizer import word_tokenizer
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from photon_train.inference.engine import Engine, EngineSettings
from photon_train.inference.request import SamplingParams
from photon_train.inference.streaming import TextStream

TEXT = "naïve — 日本 and 🙂🙂, stop here"


def pieces(text: str, stop: tuple[str, ...] = (), prompt: str = "x") -> tuple[list[str], TextStream]:
    """What a stream gives out, token by token; ends at a stop text."""
    tokenizer = byte_tokenizer()
    stream, given = TextStream(tokenizer, tokenizer(prompt)["input_ids"], stop), []
    ids = tokenizer(text)["input_ids"]
    for place, token in enumerate(ids):
        stopped = stream.push(token)
        given.append(stream.take(stopped or place == len(ids) - 1))
        if stopped:
            break
    return given, stream


def test_pieces_are_whole_characters_and_make_the_text():
    given, stream = pieces(TEXT)
    assert "".join(given) == stream.text == TEXT
    assert "🙂" in given and not any("\ufffd" in piece for piece in given)


@pytest.mark.parametrize(
    ("stop", "until"),
    [
        (("stop",), "naïve — 日本 and 🙂🙂, "),
        (("日本",), "naïve — "),
        (("here", ", s"), "naïve — 日本 and 🙂🙂"),
        (("n",), ""),
    ],
)
def test_nothing_of_a_stop_text_is_given_out(stop, until):
    given, stream = pieces(TEXT, stop)
    assert "".join(given) == stream.text == until and stream.stopped


def test_what_only_looked_like_a_stop_text_is_given_out_later():
    given, stream = pieces("aab aac", ("aac!", "b b"))
    assert "".join(given) == "aab aac" and not stream.stopped
    assert given[0] == "" and "aab" not in given[0]


def test_several_stop_texts_that_may_have_begun_hold_back_the_longest():
    given, stream = pieces("xay", ("ab", "xay"))
    assert given == ["", "", ""] and stream.text == "" and stream.stopped


def test_of_stop_texts_in_one_token_the_first_in_the_text_ends_it():
    stream = TextStream(word_tokenizer(), [], stop=("5", "0"))
    assert stream.push(5) and stream.take(True) == stream.text == "t"


def test_special_tokens_are_no_text():
    tokenizer = byte_tokenizer()
    stream = TextStream(tokenizer, [], ())
    for token in (*tokenizer("ab")["input_ids"], tokenizer.eos_token_id):
        assert not stream.push(token)
    assert stream.take(True) == "ab"


def test_a_stop_text_before_an_unfinished_character_ends_the_text():
    """Byte-level vocabularies hold tokens of a text and the first byte of a character."""
    vocabulary = {**byte_tokenizer().get_vocab(), "stopð": 300}  # ð stands for the byte F0
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    stream = TextStream(PreTrainedTokenizerFast(tokenizer_object=tokenizer), [], ("stop",))
    assert not stream.push(300) and stream.take(False) == ""
    assert stream.take(True) == stream.text == "" and stream.stopped


def test_the_first_word_is_written_as_after_the_prompt():
    """Tokenizers with marked spaces drop that of a text's first word."""
    words = Tokenizer(models.WordLevel({"▁one": 0, "▁two": 1}, unk_token="▁one"))
    words.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    for prompt, text in (([], "two"), ([0], " two")):
        stream = TextStream(tokenizer, prompt, ())
        stream.push(1)
        assert stream.take(True) == text


def test_an_unfinished_character_at_the_end_is_given_out():
    tokenizer = byte_tokenizer()
    stream = TextStream(tokenizer, [], ())
    for token in tokenizer("a🙂")["input_ids"][:-1]:
        assert not stream.push(token)
    assert stream.take(False) == "a" and stream.take(True).startswith("\ufffd")


@pytest.fixture
def engine() -> Engine:
    model = photon_model("memory")
    model.generation_config.eos_token_id = None
    return Engine(model, word_tokenizer(), EngineSettings(max_length=64, max_sequences=4))


def test_stream_yields_every_token_and_the_text(engine):
    prompts = ["t05 t06 t07", tokens(1, 20)[0].tolist()]
    params = SamplingParams(max_new_tokens=8, n=2, temperature=1.0)
    answers = engine.generate(prompts, params)
    events = list(engine.stream(prompts, params))
    assert {(event.request_id, event.index) for event in events} == {(0, 0), (0, 1), (1, 0), (1, 1)}
    for number, answer in enumerate(answers):
        for one in answer:
            mine = [event for event in events if (event.request_id, event.index) == (number, one.index)]
            assert [event.token for event in mine] == one.tokens
            assert "".join(event.text for event in mine) == one.text
            assert [event.finish_reason for event in mine] == [None] * 7 + ["length"]
    assert not engine.has_work


def test_stop_text_ends_a_request(engine):
    free = engine.generate(["t05 t06 t07"], SamplingParams(max_new_tokens=12))[0][0]
    word = f"t{free.tokens[6]:02d}"
    place = free.text.index(word)
    stopped = engine.generate(["t05 t06 t07"], SamplingParams(max_new_tokens=12, stop=word))[0][0]
    assert stopped.text == free.text[:place] and stopped.finish_reason == "stop"
    assert stopped.tokens == free.tokens[: len(stopped.tokens)] and len(stopped.tokens) <= 7


def test_leaving_a_stream_drops_its_requests(engine):
    for event in engine.stream([[5, 6, 7], [8, 9]], SamplingParams(max_new_tokens=30)):
        if event.request_id == 1:
            break
    assert not engine.has_work and not engine.scheduler.running
