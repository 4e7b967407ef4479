"""Retrieval tasks of RULER (arXiv 2404.06654) in texts of one's own: prompts of a given length, and their score.

Prompts have RULER's published form, as lm-evaluation-harness words them, and its score. Where RULER downloads Paul
Graham's essays and lists of words, haystacks and words come from the documents given.
"""

from __future__ import annotations

import random
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from photon_train.data.corpora import Document
from photon_train.errors import PhotonError
from photon_train.inference.tokens import prompt_tokens

NEEDLE = "One of the special magic numbers for {key} is: {value}."
NIAH = (
    "Some special magic numbers are hidden within the following text. Make sure to memorize it. I will quiz you about "
    "the numbers afterwards.\n{context}\nWhat are all the special magic numbers for {query} mentioned in the provided "
    "text?"
)
NIAH_PREFIX = " The special magic numbers for {query} mentioned in the provided text are"
# What RULER replaces where one number is asked for, in this order.
_SINGULAR = (("Some", "A"), ("are all", "is"), ("are", "is"), ("numbers", "number"))
_NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
_TRACKING = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\nQuestion: Find "
    "all variables that are assigned the value {value} in the text above."
)
_TRACKING_PREFIX = (
    " Answer: According to the chain(s) of variable assignment in the text above, {count} variables are assgined the "
    "value {value}, they are: "  # the published prompt's spelling
)
_HOPS = 4
_COMMON = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
    "appear most often.\n{context}\nQuestion: What are the 10 most common words in the above list?"
)
_COMMON_PREFIX = " Answer: The top 10 words that appear most often in the list are:"
_COMMON_COUNT = 10
# Below this length RULER repeats words less often, so that a list of them fits.
_SHORT = 4096
_MOST_WORDS = 4000
# Tokens beyond the answers' own that a model may write: commas, "and", a repeated phrase.
_SLACK = 16
# A "sentence" of code or of a table may have no end.
_SENTENCE_WORDS = 60
_RANDOM_DEPTHS = tuple(range(0, 101, 5))

SINGLE = "niah_single"
# Task -> keys in the text, values of each, keys that are asked for.
_NEEDLES = {SINGLE: (1, 1, 1), "niah_multikey": (4, 1, 1), "niah_multivalue": (1, 4, 1), "niah_multiquery": (4, 1, 4)}
TASKS = (*_NEEDLES, "vt", "cwe")


@dataclass(frozen=True)
class Sample:
    """One prompt.

    Attributes:
        task: One of `TASKS`.
        length: Tokens that prompt and answer have to fit.
        depth: Of a single needle, percent of the text before it; else None.
        tokens: The prompt; it ends in the first words of the answer.
        answers: What the answer has to contain.
        answer_tokens: The first answer, as it would follow the prompt.
        max_new_tokens: Tokens that may be written.
    """

    task: str
    length: int
    depth: int | None
    tokens: list[int]
    answers: tuple[str, ...]
    answer_tokens: list[int]
    max_new_tokens: int


@dataclass(frozen=True)
class _Prompt:
    text: str
    prefix: str
    answers: tuple[str, ...]


class Haystack:
    """Sentences and words of documents, from which prompts are made.

    Args:
        documents: Held-out texts.

    Raises:
        PhotonError: if they hold too few sentences or words.
    """

    def __init__(self, documents: Sequence[Document]) -> None:
        self.sentences: list[str] = []
        counts: Counter[str] = Counter()
        for document in documents:
            text = " ".join(document.text.split())
            for sentence in re.split(r"(?<=[.!?])\s+", text):
                words = sentence.split()
                for start in range(0, len(words), _SENTENCE_WORDS):
                    self.sentences.append(" ".join(words[start : start + _SENTENCE_WORDS]))
            counts.update(re.findall(r"\b[a-z]{4,9}\b", text))
        # By count, then by letters: the same words wherever the same documents are read.
        self.words = [word for word, _ in sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))[:_MOST_WORDS]]
        if len(self.sentences) < 20 or len(self.words) < 100:
            raise PhotonError(
                f"the held-out text has {len(self.sentences)} sentences and {len(self.words)} different words: give "
                "more (--data), prose if you can"
            )

    def take(self, start: int, count: int) -> list[str]:
        """`count` sentences from the one at `start` on; the first follows the last."""
        size = len(self.sentences)
        return [self.sentences[(start + index) % size] for index in range(count)]


def make_samples(
    task: str,
    haystack: Haystack,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    count: int,
    seed: int = 0,
    depths: Sequence[int] = (0, 25, 50, 75, 100),
    chat_template: bool = False,
) -> list[Sample]:
    """Prompts of one task, as long as fits `length` tokens with their answers.

    Args:
        task: One of `TASKS`.
        haystack: Where text and words come from.
        tokenizer: Of the model that will answer.
        length: Tokens of prompt and answer.
        count: Prompts; sample i depends on `seed`, `task`, `length` and i alone.
        seed: Seed of needles, places and words.
        depths: Percent of the text before a single needle; samples take them in turns.
        chat_template: Ask in a user turn of the tokenizer's template; the answer's first words begin the reply.

    Raises:
        PhotonError: for an unknown task, a tokenizer without a template, or a `length` that no prompt fits.
    """
    if task not in TASKS:
        raise PhotonError(f"there is no long task {task!r}: the tasks are {', '.join(TASKS)}")
    if chat_template and not tokenizer.chat_template:
        raise PhotonError("--chat-template: the tokenizer has no chat template; leave the option out")
    samples = []
    for index in range(count):
        rng = random.Random(f"{seed} {task} {length} {index}")
        depth = depths[index % len(depths)] if task == SINGLE else None
        if task in _NEEDLES:
            make = _needles(task, haystack, rng, depth)
        else:
            make = _tracking(rng) if task == "vt" else _common_words(haystack, rng, length)
        samples.append(_fit(make, task, length, depth, tokenizer, chat_template))
    return samples


def for_one(text: str) -> str:
    """A part of the needles' prompt as RULER words it where one number is asked for."""
    for plural, singular in _SINGULAR:
        text = text.replace(plural, singular)
    return text


def score(answers: Sequence[str], written: str) -> float:
    """Share of `answers` that `written` contains, whatever the case: RULER's ``string_match_all``."""
    return sum(answer.lower() in written.lower() for answer in answers) / len(answers)


def _fit(
    make: Callable[[int], _Prompt],
    task: str,
    length: int,
    depth: int | None,
    tokenizer: PreTrainedTokenizerBase,
    chat_template: bool,
) -> Sample:
    """The longest prompt that fits; `make` takes the amount of filler, and all but the filler is settled in it."""

    def encode(prompt: _Prompt) -> list[int]:
        if not chat_template:
            return prompt_tokens(tokenizer, prompt.text + prompt.prefix)
        turns = [{"role": "user", "content": prompt.text}]
        asked = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        # The template writes the special tokens itself.
        return tokenizer(asked + prompt.prefix.lstrip(), add_special_tokens=False, verbose=False).input_ids

    answers = make(1).answers
    room = length - len(tokenizer(", ".join(answers), add_special_tokens=False).input_ids) - _SLACK
    # Filler's tokens are nearly in proportion to it: a few encodings of a long text are enough.
    low, high, filler = 0, 2 * length, max(1, length // 32)
    while high - low > 1:
        used = len(encode(make(filler)))
        low, high = (filler, high) if used <= room else (low, filler)
        filler = min(max(round(filler * room / used), low + 1), high - 1)
    if low == 0:
        raise PhotonError(f"no prompt of {task} fits {length} tokens: take greater lengths (--lengths)")
    prompt = make(low)
    lead = "" if prompt.prefix.endswith(" ") else " "
    return Sample(
        task,
        length,
        depth,
        encode(prompt),
        answers,
        tokenizer(lead + answers[0], add_special_tokens=False).input_ids,
        length - room,
    )


def _needles(task: str, haystack: Haystack, rng: random.Random, depth: int | None) -> Callable[[int], _Prompt]:
    """Needles in a haystack: sentences that give numbers to keys of two words."""
    num_keys, num_values, num_queries = _NEEDLES[task]
    keys = ["-".join(rng.sample(haystack.words, 2)) for _ in range(num_keys)]
    values = {key: [str(rng.randint(10**6, 10**7 - 1)) for _ in range(num_values)] for key in keys}
    needles = [NEEDLE.format(key=key, value=value) for key in keys for value in values[key]]
    rng.shuffle(needles)
    places = [depth] if depth is not None else sorted(rng.sample(_RANDOM_DEPTHS, len(needles)))
    asked = rng.sample(keys, num_queries)
    query = ", ".join(asked[:-1]) + ", and " + asked[-1] if len(asked) > 1 else asked[0]
    start = rng.randrange(len(haystack.sentences))
    text, prefix = NIAH, NIAH_PREFIX
    if num_queries * num_values == 1:
        text, prefix = for_one(text), for_one(prefix)

    def make(count: int) -> _Prompt:
        sentences = haystack.take(start, count)
        for place, needle in sorted(zip(places, needles, strict=True), reverse=True):
            sentences.insert(round(count * place / 100), needle)
        answers = tuple(value for key in asked for value in values[key])
        return _Prompt(text.format(context=" ".join(sentences), query=query), prefix.format(query=query), answers)

    return make


def _tracking(rng: random.Random) -> Callable[[int], _Prompt]:
    """Variable tracking: a chain of assignments in noise, after a short example that is solved."""

    def chain(letters: int) -> tuple[list[str], list[str], str]:
        names: list[str] = []
        while len(names) <= _HOPS:
            name = "".join(rng.choices(string.ascii_uppercase, k=letters))
            names += [name] if name not in names else []
        value = str(rng.randint(10000, 99999))
        lines = [f"VAR {names[0]} = {value}"]
        return names, lines + [f"VAR {to} = VAR {of} " for of, to in zip(names, names[1:], strict=False)], value

    def write(names: list[str], lines: list[str], value: str, places: list[float], count: int) -> _Prompt:
        sentences = [_NOISE] * count
        for place, line in sorted(zip(places, enumerate(lines), strict=True), reverse=True):
            sentences.insert(int(place * (count + 1)), line[1])
        context = " ".join(sentences).replace(". \n", ".\n")
        prefix = _TRACKING_PREFIX.format(count=len(names), value=value)
        return _Prompt(_TRACKING.format(context=context, value=value), prefix, tuple(names))

    solved = write(*chain(3), places=sorted(rng.random() for _ in range(_HOPS + 1)), count=5)
    example = f"{solved.text}{solved.prefix}{' '.join(solved.answers)}\n\n"
    drawn, places = chain(5), sorted(rng.random() for _ in range(_HOPS + 1))

    def make(count: int) -> _Prompt:
        prompt = write(*drawn, places=places, count=count)
        return _Prompt(example + prompt.text, prompt.prefix, prompt.answers)

    return make


def _common_words(haystack: Haystack, rng: random.Random, length: int) -> Callable[[int], _Prompt]:
    """Common words extraction: ten words of a numbered list are there more often, after a short example."""
    often, rarely, in_example = (6, 1, (20, 3, 1)) if length < _SHORT else (30, 3, (40, 10, 3))
    drawn = rng.sample(haystack.words, len(haystack.words))
    order = rng.randrange(2**32)

    def write(words: list[str], common: int, uncommon: int) -> tuple[str, tuple[str, ...]]:
        listed = words[:_COMMON_COUNT] * common + words[_COMMON_COUNT:] * uncommon
        random.Random(order).shuffle(listed)
        context = " ".join(f"{number}. {word}" for number, word in enumerate(listed, 1))
        return _COMMON.format(context=context), tuple(words[:_COMMON_COUNT])

    size, common, uncommon = in_example
    text, answers = write(rng.sample(haystack.words, size), common, uncommon)
    example = text + _COMMON_PREFIX + " " + " ".join(f"{n}. {word}" for n, word in enumerate(answers, 1)) + "\n"

    def make(count: int) -> _Prompt:
        text, answers = write(drawn[: _COMMON_COUNT + count], often, rarely)
        return _Prompt(example + text, _COMMON_PREFIX, answers)

    return make
