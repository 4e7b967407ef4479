"""Tokens to text as they come, and stop texts."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from photon_train.inference.tokens import stop_tokens

# What a decoder writes for bytes that are not yet a character.
_INCOMPLETE = "\ufffd"


class TextStream:
    """Text of one sequence: final as soon as no later token can change it.

    Args:
        tokenizer: Turns ids into text; special tokens are left out.
        prompt: The prompt's ids: some tokenizers write a word differently at the start of a text.
        stop: Texts or special tokens that end the answer. Text that may be the beginning of one is held back.

    Raises:
        PhotonError: for a stop text that holds a special token beside text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: list[int], stop: tuple[str, ...]) -> None:
        ends = stop_tokens(tokenizer, stop)
        self.tokenizer, self.stop = tokenizer, tuple(text for text in stop if text not in ends)
        self.stop_ids = set(ends.values())
        # Decoding restarts a few tokens back, so that a step costs the same at any length.
        self.tokens = list(prompt[-6:])
        self.begin, self.end = 0, len(self.tokens)
        self.text, self.given, self.stopped = "", 0, False

    def push(self, token: int) -> bool:
        """Add a token; returns whether a stop text has appeared (`text` then ends before it)."""
        if token in self.stop_ids:
            self.stopped = True
            return True
        self.tokens.append(token)
        known = self._decode(self.tokens[self.begin : self.end])
        new = self._decode(self.tokens[self.begin :])
        if new.endswith(_INCOMPLETE) or len(new) <= len(known):
            return False
        self.text += new[len(known) :]
        self.begin, self.end = self.end, len(self.tokens)
        return self._cut()

    def take(self, finished: bool) -> str:
        """Text that has become final since the last call; all that is left if `finished`."""
        if finished and self.end < len(self.tokens):
            known = self._decode(self.tokens[self.begin : self.end])
            self.text += self._decode(self.tokens[self.begin :])[len(known) :]
            self.end = len(self.tokens)
            self._cut()
        until = len(self.text) if finished else len(self.text) - self._maybe_stop()
        piece = self.text[self.given : until]
        self.given = max(self.given, until)
        return piece

    def _decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _cut(self) -> bool:
        found = [place for place in (self.text.find(stop, self.given) for stop in self.stop) if place >= 0]
        if found:
            self.text, self.stopped = self.text[: min(found)], True
        return bool(found)

    def _maybe_stop(self) -> int:
        """Length of the longest end of the text that a stop text begins with."""
        longest = 0
        for stop in self.stop:
            for length in range(min(len(stop) - 1, len(self.text)), longest, -1):
                if self.text.endswith(stop[:length]):
                    longest = length
                    break
        return longest
