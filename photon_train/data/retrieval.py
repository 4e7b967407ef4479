"""Synthetic retrieval made of real text: sequences whose end can be predicted only by reading far back.

Ordinary text seldom asks for a word from thousands of tokens ago, so its loss hardly shows, and hardly teaches, whether
a memory retrieves. Three kinds of sequences do: *needles* (a statement hidden in text and asked for at the end, as in
RULER, arXiv 2404.06654), *key-value lists* that several questions are asked about, and *repeated spans* of the text.
All numbers that are asked for are drawn, so that nothing but the sequence itself can tell them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from photon_train.data.chat import encode_chat
from photon_train.errors import PhotonError

# A statement, the question about it, and what the answer starts with.
TEMPLATES = (
    (
        "The special magic number for {key} is {value}.",
        "What is the special magic number for {key}?",
        "The special magic number for {key} is",
    ),
    ("Remember that the code of the {key} is {value}.", "What is the code of the {key}?", "The code of the {key} is"),
    ("The {key} costs {value} coins.", "How many coins does the {key} cost?", "The number of coins is"),
    ("One of the entries reads: {key}, number {value}.", "Which number does {key} have?", "Its number is"),
)
LIST_TEMPLATE = ("{key}: {value}", "Which value does the list give for {key}?", "{key}:")
_FIRST = (
    "amber bright calm clever cold curious dusty eager early faint gentle golden grand green hidden honest humble icy "
    "idle jolly keen lazy light lonely lucky mellow misty modest narrow noble odd pale plain proud quick quiet rapid "
    "rough royal rusty sharp shy silent silver smooth solemn steady sweet tall tidy tiny vast warm wild wise young"
).split()
_SECOND = (
    "anchor apple basket beacon bell bridge candle canyon castle cedar clock cloud comet coral crown desert drum eagle "
    "engine falcon feather forest fountain garden glacier hammer harbor hill island kettle ladder lantern lemon maple "
    "meadow mirror mountain needle ocean orchard otter paper pearl pepper pillow planet prism rabbit ribbon river "
    "saddle sail shadow shell spoon stone temple thunder tiger tower tunnel valley violin wagon whale willow window"
).split()
_MARK = "\u2042photon\u2042"  # stands for the text while a chat template is written out
_AGAIN = "\nAs was written above:\n"
_SPAN = 16  # shortest repeated span, tokens
_CUE = 4  # tokens of a repeated span after which its continuation can be known


@dataclass(frozen=True)
class Sample:
    """One sequence.

    Attributes:
        ids: ``[length]`` int64.
        answers: ``[length]`` bool, true on the tokens that answer a question or repeat what was there.
        learned: ``[length]`` bool, true where there is something to learn: the answers, and real text.
    """

    ids: Tensor
    answers: Tensor
    learned: Tensor


def periodic_sequences(tokens: Tensor, count: int, length: int, period: int, generator: torch.Generator) -> Tensor:
    """Random spans of `period` tokens, each repeated to `length`.

    Args:
        tokens: Real text, ``[N]``.
        generator: On the CPU.

    Returns:
        ``[count, length]`` int64.

    Raises:
        PhotonError: if the text is shorter than the period.
    """
    if not 1 <= period <= len(tokens):
        raise PhotonError(f"a period of {period} tokens cannot be taken from a text of {len(tokens)}: give more text")
    first = torch.randint(len(tokens) - period + 1, (count, 1), generator=generator)
    return tokens.long()[first + torch.arange(length) % period]


def needle_sequences(
    tokens: Tensor, tokenizer: PreTrainedTokenizerBase, count: int, length: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """One needle each, at a depth drawn evenly from all but the last eighth; the question and its answer come last.

    Args:
        tokens: Real text, ``[N]``; special tokens in it are left out.
        generator: On the CPU.

    Returns:
        Token ids ``[count, length]`` int64, and a mask of the answers' tokens, the same shape, bool. The needle's own
        number is not in the mask.

    Raises:
        PhotonError: if the length does not hold a needle and its question.
    """
    text = plain_text(tokens, tokenizer)
    samples = [needle_sample(text, tokenizer, length, generator) for _ in range(count)]
    return torch.stack([sample.ids for sample in samples]), torch.stack([sample.answers for sample in samples])


def needle_sample(
    text: Tensor,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    generator: torch.Generator,
    needles: int = 1,
    chat: bool = False,
) -> Sample:
    """Needles at depths drawn evenly from all but the last eighth of the sequence, each asked for at the end.

    Args:
        text: From `plain_text`.
        needles: Statements, each of another key.
        chat: Write it as a conversation, and learn what the assistant says alone.

    Raises:
        PhotonError: as `needle_sequences`, or if the chat template changes what the user says.
    """
    facts = [
        (TEMPLATES[_draw(len(TEMPLATES), generator)], key, _number(generator)) for key in _keys(needles, generator)
    ]
    inserts = [_encode(tokenizer, f"\n{each[0].format(key=key, value=value)}\n") for each, key, value in facts]
    return _asked(text, tokenizer, length, generator, inserts, _shuffled(facts, generator), chat)


def list_sample(
    text: Tensor,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    generator: torch.Generator,
    records: int,
    questions: int,
    chat: bool = False,
) -> Sample:
    """A list of key-value records somewhere in the text, and questions about some of them at the end.

    Args:
        text, chat: As for `needle_sample`.
        records, questions: How many; the questions are about different records.

    Raises:
        PhotonError: as `needle_sample`.
    """
    facts = [(LIST_TEMPLATE, key, _number(generator)) for key in _keys(records, generator)]
    lines = "\n".join(each[0].format(key=key, value=value) for each, key, value in facts)
    asked = _shuffled(facts, generator)[:questions]
    return _asked(text, tokenizer, length, generator, [_encode(tokenizer, f"\n{lines}\n")], asked, chat)


def span_sample(
    text: Tensor,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    generator: torch.Generator,
    spans: int,
    only_answers: bool = False,
) -> Sample:
    """Text in which spans of it come again later, announced by a short sentence.

    A repetition's first four tokens are no answers: nothing tells which span it will be.

    Args:
        text: From `plain_text`.
        spans: Repetitions; a span has 16 tokens to an eighth of the sequence's share of each.
        only_answers: Learn what is repeated alone, not the text.

    Raises:
        PhotonError: if the sequence is too short to repeat anything.
    """
    cue = _encode(tokenizer, _AGAIN)
    most = length // (4 * spans) - len(cue)
    if most < _SPAN:
        raise PhotonError(f"{length} tokens are too few to repeat {spans} spans of at least {_SPAN} tokens")
    # Evenly on a logarithmic scale.
    sizes = (_SPAN * (most / _SPAN) ** torch.rand(spans, generator=generator)).long().tolist()
    room = length - sum(len(cue) + size for size in sizes)
    haystack = _stretch(text, room, generator)
    places = torch.randint(max(sizes), room + 1, (spans,), generator=generator).sort().values.tolist()
    ids, answers, learned, taken = [], [], [], 0
    for place, size in [*zip(places, sizes, strict=True), (room, 0)]:
        ids.append(haystack[taken:place])
        answers.append(torch.zeros(place - taken, dtype=torch.bool))
        learned.append(torch.full((place - taken,), not only_answers))
        taken = place
        if size:
            source = _draw(place - size + 1, generator)
            ids += [cue, haystack[source : source + size]]
            is_known = torch.arange(len(cue) + size) >= len(cue) + _CUE
            answers.append(is_known)
            learned.append(is_known)
    return Sample(torch.cat(ids), torch.cat(answers), torch.cat(learned))


def plain_text(tokens: Tensor, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """`without_special`, which must leave something.

    Raises:
        PhotonError: if every token is a special one.
    """
    text = without_special(tokens, tokenizer)
    if not len(text):
        raise PhotonError("there is no text to make retrieval of: every token is a special one")
    return text


def without_special(tokens: Tensor, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """`tokens` as int64 without special ones: ends of documents, padding, the marks of a conversation."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = {*tokenizer.all_special_ids, *(number for number, token in added.items() if token.special)}
    tokens = tokens.long()
    return tokens[~torch.isin(tokens, torch.tensor(sorted(special), dtype=torch.long))]


def longest_fact(tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens, about, of the longest statement together with its question and answer."""
    key, value = "a" * max(map(len, _FIRST)) + " " + "b" * max(map(len, _SECOND)), "9" * 7
    texts = ["\n".join(each).format(key=key, value=value) for each in (*TEMPLATES, LIST_TEMPLATE)]
    return max(len(_encode(tokenizer, f"\n{text} {value}.\n")) for text in texts)


def shortest_span_sample(tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens of the shortest sequence that repeats one span."""
    return 4 * (_SPAN + len(_encode(tokenizer, _AGAIN)))


# --- assembly ---


def _asked(text, tokenizer, length, generator, inserts: list[Tensor], facts: Sequence, chat: bool) -> Sample:
    """Text with `inserts` at random depths, and questions about `facts` at the end."""
    head, tail, answers = (_chat_frame if chat else _plain_frame)(tokenizer, facts)
    room = length - len(head) - len(tail) - sum(map(len, inserts))
    if room < 0:
        raise PhotonError(
            f"{length} tokens are too few for statements of {sum(map(len, inserts))} tokens and questions of "
            f"{len(head) + len(tail)} about them: take longer sequences, or fewer statements"
        )
    haystack = _stretch(text, room, generator)
    # Where a statement may begin: before the last eighth, and before the questions.
    latest = min(room, max(0, length - length // 8 - len(head) - sum(map(len, inserts))))
    places = torch.randint(latest + 1, (len(inserts),), generator=generator).sort().values.tolist()
    parts, taken = [(head, False)], 0
    for place, insert in zip([*places, room], [*inserts, None], strict=True):
        parts.append((haystack[taken:place], not chat))
        taken = place
        if insert is not None:
            parts.append((insert, False))
    ids = torch.cat([*(part for part, _ in parts), tail])
    learned = torch.cat([*(torch.full((len(part),), is_learned) for part, is_learned in parts), answers])
    at_end = torch.cat([torch.zeros(length - len(tail), dtype=torch.bool), answers])
    return Sample(ids, at_end, learned)


def _plain_frame(tokenizer, facts) -> tuple[Tensor, Tensor, Tensor]:
    """Nothing before the text; after it the questions with their answers, and which tokens answer."""
    ids, answers = [], []
    for (_, question, lead), key, value in facts:
        asked = _encode(tokenizer, f"\n{question.format(key=key)} {lead.format(key=key)}")
        whole = _encode(tokenizer, f"\n{question.format(key=key)} {lead.format(key=key)} {value}")
        # What the tokenizer makes of the answer depends on what stands before it.
        same = min(len(asked), len(whole))
        common = int((asked[:same] == whole[:same]).long().cumprod(0).sum())
        ids.append(whole)
        answers.append(torch.arange(len(whole)) >= common)
    return torch.zeros(0, dtype=torch.long), torch.cat(ids), torch.cat(answers)


def _chat_frame(tokenizer, facts) -> tuple[Tensor, Tensor, Tensor]:
    """The same as a conversation in which the user gives the text and asks, and the assistant answers."""
    messages = []
    for (_, question, lead), key, value in facts:
        messages.append({"role": "user", "content": question.format(key=key)})
        messages.append({"role": "assistant", "content": f"{lead.format(key=key)} {value}."})
    first = {"role": "user", "content": f"{_MARK}\n\n{messages[0]['content']}"}
    written = tokenizer.apply_chat_template([first, *messages[1:]], tokenize=False)
    if written.count(_MARK) != 1:
        raise PhotonError(
            "the chat template does not write what the user says once, so no text can be put there: set "
            "dataset.retrieval_share to 0"
        )
    head, tail = (_encode(tokenizer, part) for part in written.split(_MARK))
    # Both end alike, and what the assistant says first comes after the place of the text.
    says = torch.from_numpy(encode_chat(tokenizer, messages)[1])[-len(tail) :]
    answers = torch.cat([torch.zeros(len(tail) - len(says), dtype=torch.bool), says])
    return head, tail, answers


def _stretch(text: Tensor, length: int, generator: torch.Generator) -> Tensor:
    """`length` tokens of the text from a random place on; a text that is shorter begins again."""
    first = _draw(max(1, len(text) - length + 1), generator)
    return text[(first + torch.arange(length)) % len(text)]


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    ids = tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.long)


def _keys(count: int, generator: torch.Generator) -> list[str]:
    """Different keys of two words."""
    chosen = torch.randperm(len(_FIRST) * len(_SECOND), generator=generator)[:count].tolist()
    return [f"{_FIRST[number // len(_SECOND)]} {_SECOND[number % len(_SECOND)]}" for number in chosen]


def _number(generator: torch.Generator) -> str:
    """Seven digits."""
    return str(int(torch.randint(10**6, 10**7, (), generator=generator)))


def _draw(below: int, generator: torch.Generator) -> int:
    return int(torch.randint(below, (), generator=generator))


def _shuffled(items: Sequence, generator: torch.Generator) -> list:
    return [items[number] for number in torch.randperm(len(items), generator=generator).tolist()]
