"""Sentences of words that nobody knows, shared by the tests."""

from __future__ import annotations

import random
import string


def prose(seed: int, sentences: int) -> str:
    """So many sentences of nine words each, of a vocabulary of 300 that the seed draws."""
    rng = random.Random(seed)
    vocabulary = ["".join(rng.choices(string.ascii_lowercase, k=rng.randint(4, 9))) for _ in range(300)]
    return " ".join(" ".join(rng.sample(vocabulary, 9)).capitalize() + "." for _ in range(sentences))
