"""Ask an exported model three questions about one long text, which it reads once.

python tools/ask_long.py --model runs/smollm2-photon/export --dense runs/smollm2 --text novel.txt

Three numbers are hidden in the text, near its beginning, its middle and its end, in the words of RULER
(arXiv 2404.06654), and asked for one after the other, each from the cache of the text. Printed are the answers, what
the cache holds, and the seconds; with `--dense` the dense model's beside them.
"""

from __future__ import annotations

import argparse
import copy
import random
import re
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

import photon_train.models  # noqa: F401  (its architectures become known to transformers)
from photon_train import accounting
from photon_train.accounting import format_bytes
from photon_train.checkpoints import with_softcap
from photon_train.cli import main_wrapper
from photon_train.errors import PhotonError
from photon_train.evaluation.positions import segment_length
from photon_train.evaluation.ruler import NEEDLE, NIAH, NIAH_PREFIX, for_one
from photon_train.inference.tokens import prompt_tokens

_KEYS = ("harbour", "lantern", "orchard")
_PLACES = (0.1, 0.5, 0.9)
_LEAD, _, _QUESTIONS = NIAH.partition("{context}")
# One number at a time is asked for.
_QUESTION = for_one(_QUESTIONS + NIAH_PREFIX)


def hide(text: str, values: list[str]) -> str:
    """`text` with a fact at each of the places, between two sentences."""
    sentences = re.split(r"(?<=[.!?])\s+", text)
    for place, key, value in sorted(zip(_PLACES, _KEYS, values, strict=True), reverse=True):
        sentences.insert(round(place * len(sentences)), NEEDLE.format(key=key, value=value))
    return " ".join(sentences)


def shortened(text: str, tokenizer: PreTrainedTokenizerBase, tokens: int) -> str:
    """The beginning of `text`, of so many tokens.

    Raises:
        PhotonError: if it has fewer.
    """
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    if len(ids) < tokens:
        raise PhotonError(f"--text has {len(ids):,} tokens: give a longer one, or lower --tokens {tokens}")
    return tokenizer.decode(ids[:tokens])


@torch.no_grad()
def answers(directory: str, tokenizer: PreTrainedTokenizerBase, text: str) -> dict[str, Any]:
    """What the model in `directory` writes to each question, its cache's bytes, and the seconds that it took."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = with_softcap(AutoModelForCausalLM.from_pretrained(directory, dtype="auto")).to(device).eval()
    read = torch.tensor([prompt_tokens(tokenizer, _LEAD + text)], device=device)
    began, cache = time.perf_counter(), None
    for part in read.split(segment_length(model), dim=1):
        cache = model.base_model(input_ids=part, past_key_values=cache, use_cache=True).past_key_values
    reading, written = time.perf_counter() - began, []
    for key in _KEYS:
        asked = tokenizer(_QUESTION.format(query=key), return_tensors="pt", add_special_tokens=False).input_ids.to(
            device
        )
        ids = torch.cat([read, asked], dim=1)
        settings = {"do_sample": False, "repetition_penalty": 1.0, "max_new_tokens": 12, "pad_token_id": 0}
        out = model.generate(ids, past_key_values=copy.deepcopy(cache), **settings)
        written.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip())
    config, length = model.config, read.shape[1]
    is_photon = hasattr(model, "new_cache")
    held = accounting.cache_bytes(config, length).total if is_photon else accounting.dense_cache_bytes(config, length)
    return {
        "written": written,
        "tokens": length,
        "bytes": held,
        "growing": accounting.growing_bytes_per_token(config) if is_photon else held / length,
        "reading": reading,
        "answering": time.perf_counter() - began - reading,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="an exported model: a directory")
    parser.add_argument("--dense", default=None, help="the dense model it was made of, to ask as well")
    parser.add_argument("--text", type=Path, required=True, help="the text, UTF-8")
    parser.add_argument("--tokens", type=int, default=2048, help="how much of it is read (2048)")
    parser.add_argument("--seed", type=int, default=0, help="draws the numbers")
    options = parser.parse_args()
    rng = random.Random(options.seed)
    values = [str(rng.randint(1_000_000, 9_999_999)) for _ in _KEYS]
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    try:
        content = options.text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PhotonError(f"--text {options.text} cannot be read: {error}") from error
    text = hide(shortened(content, tokenizer, options.tokens), values)
    models = {"PHOTON": options.model} | ({"dense": options.dense} if options.dense else {})
    found = {name: answers(directory, tokenizer, text) for name, directory in models.items()}
    table = Table("", *found, title=f"Three questions about {options.text.name}, {found['PHOTON']['tokens']:,} tokens")
    for number, (place, key, value) in enumerate(zip(_PLACES, _KEYS, values, strict=True)):
        cells = [
            f"{each['written'][number]} {'✓' if value in each['written'][number] else '✗'}" for each in found.values()
        ]
        table.add_row(f"{key}, {value}, {place:.0%} into the text", *cells)
    table.add_row("cache of the text", *[format_bytes(each["bytes"]) for each in found.values()])
    table.add_row("grows per token by", *[format_bytes(each["growing"]) for each in found.values()])
    table.add_row("read in", *[f"{each['reading']:.1f} s" for each in found.values()])
    table.add_row("three answers in", *[f"{each['answering']:.1f} s" for each in found.values()])
    Console().print(table)


if __name__ == "__main__":
    main_wrapper(main)
