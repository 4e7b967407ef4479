"""Prompts without an end token, stop texts that are tokens, tokens that are no whole characters."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from tiny import photon_model
from tiny_checkpoint import byte_tokenizer
from tiny_tokenizer import word_tokenizer
from tokenizers import Tokenizer, decoders, models, processors
from transformers import PreTrainedTokenizerFast

from photon_train.errors import PhotonError
from photon_train.inference.answers import ChatStyle, Choice, Echo, Style
from photon_train.inference.engine import Engine, EngineSettings
from photon_train.inference.request import Event, SamplingParams
from photon_train.inference.text import generate_text
from photon_train.inference.tokens import TokenWriter, prompt_tokens


def with_template(template: str) -> PreTrainedTokenizerFast:
    tokenizer = word_tokenizer()
    backend = tokenizer.backend_tokenizer
    backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("t00", 0), ("t01", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="t00", eos_token="t01", pad_token="t02")


@pytest.mark.parametrize(
    ("template", "text", "expected"),
    [
        ("$A", "t05 t01", [5, 1]),
        ("t00 $A", "t05", [0, 5]),
        ("$A t01", "t05 t06", [5, 6]),
        ("t00 $A t01", "t05 t01", [0, 5, 1]),
        ("t00 $A t01", "", [0]),
        ("t01 $A", "t05", [1, 5]),  # the same token begins and ends a text
    ],
)
def test_a_prompt_has_no_end(template, text, expected):
    assert prompt_tokens(with_template(template), text) == expected


def test_all_who_continue_a_text_leave_its_end_out():
    model, tokenizer = photon_model("memory"), with_template("t00 $A t01")
    model.generation_config.eos_token_id = None
    engine = Engine(model, tokenizer, EngineSettings(max_length=64))
    expected = engine.generate([[0, 5, 6]], SamplingParams(max_new_tokens=5))[0][0].text
    assert engine.generate(["t05 t06"], SamplingParams(max_new_tokens=5))[0][0].text == expected
    texts = generate_text(model, tokenizer, ["t05 t06", "t07 t08 t09"], 5, do_sample=False)
    assert texts[0].strip() == expected.strip()


def engine_that_ends(token: int, after: int) -> Engine:
    """An engine whose model says `token` as its answer's token number `after`."""
    model = photon_model("memory")
    model.generation_config.eos_token_id = None
    engine = Engine(model, word_tokenizer(), EngineSettings(max_length=64))
    advance = engine._advance

    def other(sequence, choice):
        if len(sequence.output) == after:
            choice = replace(choice, token=token)
        return advance(sequence, choice)

    engine._advance = other
    return engine


def test_a_special_token_can_be_a_stop_text():
    engine = engine_that_ends(1, after=3)
    params = SamplingParams(max_new_tokens=8, stop=("t01", "other"))
    answer = engine.generate(["t05"], params)[0][0]
    assert answer.finish_reason == "stop" and len(answer.tokens) == 4 and "t01" not in answer.text
    assert len(answer.text.split()) == 3
    with pytest.raises(PhotonError, match="stop 'x t01' holds the special token 't01' beside text"):
        engine.add("t05", SamplingParams(stop="x t01"))
    assert not engine.has_work


def test_bytes_are_those_of_the_token():
    tokenizer = byte_tokenizer()
    writer, ids = TokenWriter(tokenizer), tokenizer("é €a")["input_ids"]
    assert b"".join(map(writer.bytes, ids)).decode() == "é €a"
    assert [writer.text(token) for token in ids[:3]] == ["bytes:\\xc3", "bytes:\\xa9", " "]
    assert writer.text(tokenizer.eos_token_id) == "<|end|>"
    event = Event(0, 0, ids[0], -0.1, "", None, {ids[0]: -0.1, ids[1]: -2.0, ids[2]: float("-inf")})
    entry = ChatStyle(writer, 3).whole(Choice(0, [event]))["logprobs"]["content"][0]
    assert entry["bytes"] == [0xC3] and [top["bytes"] for top in entry["top_logprobs"]] == [[0xC3], [0xA9], [0x20]]
    json.dumps(entry, allow_nan=False)
    # As pieces of one character, all of them would be written alike.
    top = Style(writer, 3).whole(Choice(0, [event]))["logprobs"]["top_logprobs"][0]
    assert top == {"bytes:\\xc3": -0.1, "bytes:\\xa9": -2.0, " ": -9999.0}


def test_sentencepiece_keeps_spaces_and_tokens_apart():
    vocabulary = {"<unk>": 0, "\u2581a": 1, "a": 2, "<0xE2>": 3, "\u2581": 4, " a": 5}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    writer = TokenWriter(PreTrainedTokenizerFast(tokenizer_object=tokenizer))
    assert [writer.bytes(token) for token in range(1, 5)] == [b" a", b"a", b"\xe2", b" "]
    assert writer.texts([1, 2, 5]) == [" a", "a", "token_id:5"]
    # A token before the text, and the space that the tokenizer puts there, are no part of it.
    assert Echo("aa a", [0, 1, 2, 1]).offsets(writer) == [0, 0, 1, 2]
    assert Echo("", [0]).offsets(writer) == [0]
