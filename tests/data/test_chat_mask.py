"""Which tokens are the assistant's, where characters are composed, dropped, replaced, or have several tokens."""

from __future__ import annotations

import numpy as np
import pytest
from tiny_chat import TEMPLATE, conversation
from tiny_checkpoint import byte_tokenizer
from tokenizers import Tokenizer, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

from photon_train.data.chat import encode_chat, tokens_inside
from photon_train.data.corpora import Document
from photon_train.data.packing import pack


def chat_tokenizer(normalizer=None, template: str = TEMPLATE, trim: bool | None = None) -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    if normalizer is not None:
        tokenizer.backend_tokenizer.normalizer = normalizer
    if trim is not None:
        tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim)
    return tokenizer


def learned(tokenizer, *texts: str) -> str:
    ids, mask = encode_chat(tokenizer, conversation(*texts))
    return tokenizer.decode(ids[mask])


BARE = TEMPLATE.replace("{{ '<' + message['role'] + '>' }}", "").replace(" + '<|end|>'", "")


def test_letters_that_are_composed_with_the_users_are_not_learned() -> None:
    """The last character's token could not be found, and all that the user said after it was learned."""
    tokenizer = chat_tokenizer(normalizers.NFC(), BARE)
    assert learned(tokenizer, "say it", "cafe", "\u0301 is the user's", "yes") == "cafyes"
    assert learned(tokenizer, "say it", "cafe\u0301", "more", "yes") == "caf\u00e9yes"


def test_a_last_character_of_several_tokens_is_learned_whole() -> None:
    assert learned(chat_tokenizer(template=BARE), "a", "caf\u00e9", "b \u00e9", "\U0001f600") == "caf\u00e9\U0001f600"


def test_a_first_character_that_is_dropped_takes_nothing_with_it() -> None:
    """The whole answer, and all answers after it, were not learned."""
    tokenizer = chat_tokenizer(normalizers.Replace("\u200b", ""))
    assert learned(tokenizer, "a", "\u200byes", "b", "no\u200b") == "yes<|end|>no<|end|>"


def test_what_is_replaced_across_the_border_is_not_learned() -> None:
    assert learned(chat_tokenizer(normalizers.Replace("ab", "Q"), BARE), "xa", "bc", "d", "e") == "ce"
    assert learned(chat_tokenizer(normalizers.Replace("ab", "Q"), BARE), "x", "ca", "bd", "e") == "ce"


@pytest.mark.parametrize("trim", [True, False])
def test_white_space_of_the_template_in_a_token_with_the_first_word_does_no_harm(trim: bool) -> None:
    words = {word: number for number, word in enumerate(["<unk>", "\u0120yes", "\u010a", "\u0120", "q", ":"])}
    backend = Tokenizer(
        models.BPE(
            vocab={**words, "y": 6, "e": 7, "s": 8, "ye": 9, "yes": 10},
            merges=[("y", "e"), ("ye", "s"), ("\u0120", "yes")],
            unk_token="<unk>",
        )
    )
    backend.pre_tokenizer = byte_tokenizer().backend_tokenizer.pre_tokenizer
    backend.post_processor = processors.ByteLevel(trim_offsets=trim)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content + ': ' }}{% else %}"
        "{% generation %}{{ m.content + '\n' }}{% endgeneration %}{% endif %}{% endfor %}"
    )
    ids, mask = encode_chat(tokenizer, conversation("q", "yes", "q", "yes yes"))
    assert tokenizer.convert_ids_to_tokens(ids[mask]) == ["\u0120yes", "\u010a", "\u0120yes", "\u0120yes", "\u010a"]


def test_random_conversations_agree_with_characters() -> None:
    """Where every character has tokens of its own, those of the spans are learned and no others."""
    generator, letters = np.random.default_rng(0), list("ab \n\u00e9\u20ac\U0001f600")
    for _ in range(50):
        text = "".join(generator.choice(letters, 30))
        cuts = sorted(generator.choice(31, 4, replace=False).tolist())
        spans = [(cuts[0], cuts[1]), (cuts[2], cuts[3])]
        encoded = chat_tokenizer()(text, return_offsets_mapping=True)
        mask = tokens_inside(text, spans, np.asarray(encoded["offset_mapping"]))
        said = np.asarray(encoded["input_ids"])[mask]
        assert chat_tokenizer().decode(said) == "".join(text[first:end] for first, end in spans)


def test_silent_conversations_are_counted(caplog) -> None:
    documents = [Document(f"c{i}", "-", tuple(conversation("a", *["b"] * (i > 1)))) for i in range(5)]
    pack(documents, chat_tokenizer(), 16, 1, 256, progress=False)
    assert "2 of 5 conversations are left out: no token of them is the assistant's" in caplog.text
