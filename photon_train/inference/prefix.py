"""Prefixes of prompts that are kept, so that equal ones are encoded once.

A prefix is found by the hash of its tokens. Kept are the state at the end of each prefill segment and at the end of
each prompt, the latter with the logits of what follows. A kept prefix is a sequence of the cache that nobody writes:
whoever goes on from it shares its full blocks and copies what is bounded.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from dataclasses import dataclass

import torch

from photon_train.inference.blocks import Allocation
from photon_train.inference.cache import PagedCache

_END = b"end of prompt"  # A prompt and the same tokens as the prefix of a longer one keep different things.


def prefix_keys(tokens: list[int], stride: int) -> list[tuple[int, bytes]]:
    """``(length, hash)`` of the prefixes of `tokens`: every `stride` tokens, and the whole as a prompt's end."""
    chain, keys = hashlib.sha256(), []
    for start in range(0, len(tokens), stride):
        chain.update(array("q", tokens[start : start + stride]).tobytes())
        if start + stride < len(tokens):
            keys.append((start + stride, chain.digest()))
    chain.update(_END)
    return [*keys, (len(tokens), chain.digest())]


@dataclass(frozen=True)
class Prefix:
    """A kept state, and at a prompt's end the logits of its next token, ``[V]``."""

    allocation: Allocation
    logits: torch.Tensor | None


class PrefixCache:
    """The most recently used prefixes, at most `max_prefixes`; each takes a row of the cache.

    Attributes:
        hit_tokens: Tokens of prompts that did not have to be encoded.
    """

    def __init__(self, cache: PagedCache, max_prefixes: int) -> None:
        self.cache, self.max_prefixes = cache, max_prefixes
        self._kept: OrderedDict[bytes, Prefix] = OrderedDict()
        self.hit_tokens = 0

    def __len__(self) -> int:
        return len(self._kept)

    def find(self, keys: list[tuple[int, bytes]]) -> Prefix | None:
        """The longest kept prefix among `keys`."""
        for _, key in reversed(keys):
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        return None

    def keep(self, key: bytes, allocation: Allocation, logits: torch.Tensor | None = None) -> None:
        """Keep a copy of a sequence's state, if there is room."""
        if self.max_prefixes == 0 or key in self._kept:
            return
        while len(self._kept) >= self.max_prefixes:
            self.evict()
        copy = self.cache.fork(allocation)
        if copy is not None:
            self._kept[key] = Prefix(copy, None if logits is None else logits.clone())

    def forget(self, keys: list[tuple[int, bytes]]) -> None:
        """Keep none of the prefixes `keys`."""
        for _, key in keys:
            if key in self._kept:
                self.cache.close(self._kept.pop(key).allocation)

    def clear(self) -> None:
        """Keep nothing."""
        while self.evict():
            pass

    def evict(self) -> bool:
        """Forget the least recently used prefix; False if there is none."""
        if not self._kept:
            return False
        _, prefix = self._kept.popitem(last=False)
        self.cache.close(prefix.allocation)
        return True
