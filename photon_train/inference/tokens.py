"""Prompts to tokens, and single tokens to what clients read."""

from __future__ import annotations

import json
import re

from transformers import PreTrainedTokenizerBase

from photon_train.errors import PhotonError

_BYTE = re.compile("<0x([0-9A-F]{2})>")  # a byte that is no token's text, in vocabularies of SentencePiece
_SPACE = "\u2581"  # a space, in those


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a text that is to be continued: with what the tokenizer puts before it, without what it puts behind."""
    tokens = tokenizer(text, verbose=False)["input_ids"]  # it would warn of long ones
    # Of one letter, which tells what is put behind any text.
    letter, bare = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
    # From the end: a vocabulary without letters may write one as the token that begins a text.
    for begin in reversed(range(len(letter) - len(bare) + 1 if bare else 0)):
        if letter[begin : begin + len(bare)] == bare:
            behind = letter[begin + len(bare) :]
            return tokens[: len(tokens) - len(behind)] if behind and tokens[-len(behind) :] == behind else tokens
    return tokens


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Tokens that are no part of a decoded text, by what they are called."""
    added = {str(token): number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)) | added


def stop_tokens(tokenizer: PreTrainedTokenizerBase, stop: tuple[str, ...]) -> dict[str, int]:
    """The stop texts that are a special token, with its id.

    Raises:
        PhotonError: for a stop text that holds one beside other text: it could never appear.
    """
    if not stop:
        return {}
    special = special_tokens(tokenizer)
    for text in stop:
        inside = [token for token in special if token and token in text]
        if inside and text not in special:
            raise PhotonError(f"stop {text!r} holds the special token {inside[0]!r} beside text: give the token alone")
    return {text: special[text] for text in stop if text in special}


class TokenWriter:
    """What a single token stands for; decoded alone, pieces of characters would all be the same.

    Args:
        tokenizer: The model's.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        decoder = _decoder(tokenizer)
        self._is_byte_level = '"ByteLevel"' in decoder
        self._has_spaces = _SPACE in decoder
        self._added = {number: str(token) for number, token in tokenizer.added_tokens_decoder.items()}

    def bytes(self, token: int) -> bytes:
        """Its bytes, which need not be whole characters."""
        if token in self._added:
            return self._added[token].encode()
        raw = self.tokenizer.convert_ids_to_tokens(token)
        if raw is None:
            return b""
        if self._is_byte_level and all(character in _BYTE_OF for character in raw):
            return bytes(_BYTE_OF[character] for character in raw)
        if found := _BYTE.fullmatch(raw):
            return bytes([int(found[1], 16)])
        if self._has_spaces:
            return raw.replace(_SPACE, " ").encode()
        return self.tokenizer.decode([token], clean_up_tokenization_spaces=False).encode()

    def text(self, token: int) -> str:
        """Its text; ``bytes:\\xe2\\x80`` where it is no whole characters, as OpenAI writes it."""
        raw = self.bytes(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def texts(self, tokens: list[int]) -> list[str]:
        """Of different tokens, different texts: one whose text another has before it goes by its number."""
        texts: list[str] = []
        for token in tokens:
            text = self.text(token)
            texts.append(f"token_id:{token}" if text in texts else text)
        return texts


def _decoder(tokenizer: PreTrainedTokenizerBase) -> str:
    """The decoder of a fast tokenizer as JSON; empty where there is none."""
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    return "" if decoder is None else json.dumps(json.loads(decoder.__getstate__()), ensure_ascii=False)


def _bytes_of_characters() -> dict[str, int]:
    """GPT-2's alphabet: printable bytes are themselves, the others the characters from 256 on, in order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


_BYTE_OF = _bytes_of_characters()
