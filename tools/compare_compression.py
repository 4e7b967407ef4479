"""PHOTON against cache compression of the dense model at the same cache bytes (kvpress).

pip install --no-deps kvpress cachetools fire termcolor
python tools/compare_compression.py --dense runs/study/dense --photon runs/study/graft/export \
    --output benchmarks/quality/compression.json

Every system reads a prefix of held-out text and is scored on the tokens that follow, once on plain text and once on
periodic text (which the prefix determines). The presses compress the prefix's cache until it is as large as PHOTON's
whole cache at that length (its growing part, windows and sinks together); the tokens that follow are kept in full. The
dense model is the fair one to compress only if it was trained as long: give the fine-tuned one where there is one.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from lib.presses import press_for
from lib.quality import periodic
from lib.study_text import study_documents
from photon_train.accounting import cache_bytes, dense_cache_bytes
from photon_train.checkpoints import read_config, with_softcap
from photon_train.cli import main_wrapper
from photon_train.data.corpora import split_documents
from photon_train.data.packing import pack
from photon_train.evaluation.report import write_rows

PRESSES = (
    "StreamingLLMPress",
    "SnapKVPress",
    "TOVAPress",
    "KnormPress",
    "ExpectedAttentionPress",
    "ObservedAttentionPress",
)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dense", type=Path, required=True, help="what tools/pretrain_dense.py wrote")
    parser.add_argument("--photon", type=Path, nargs="+", required=True, help="PHOTON checkpoints")
    parser.add_argument("--output", type=Path, required=True, help="JSON to write")
    parser.add_argument("--prefix", type=int, default=896, help="tokens that are read first")
    parser.add_argument("--scored", type=int, default=64, help="tokens after them that are scored")
    parser.add_argument("--sequences", type=int, default=48)
    return parser.parse_args()


@torch.no_grad()
def continuation_loss(model, rows: torch.Tensor, prefix: int, press=None) -> float:
    """Cross-entropy of the tokens of ``rows [B, T]`` after the first `prefix`, the prefix's cache compressed."""
    total = 0.0
    for part in rows.split(8):
        if press is None:
            logits = model(input_ids=part, use_cache=False).logits[:, prefix - 1 : -1]
        else:
            cache, position = DynamicCache(), torch.arange(part.shape[1])
            with press(model):
                first = model(
                    input_ids=part[:, :prefix], past_key_values=cache, cache_position=position[:prefix], use_cache=True
                )
            rest = model(
                input_ids=part[:, prefix:], position_ids=position[None, prefix:], past_key_values=cache, use_cache=True
            )
            logits = torch.cat([first.logits[:, -1:], rest.logits[:, :-1]], dim=1)
        total += F.cross_entropy(logits.float().flatten(0, 1), part[:, prefix:].flatten(), reduction="sum").item()
    return total / rows[:, prefix:].numel()


def main() -> None:
    options = arguments()
    recipe = json.loads((options.dense / "study.json").read_text(encoding="utf-8"))
    tokenizer = AutoTokenizer.from_pretrained(options.dense)
    _, held_out = split_documents(study_documents(recipe["megabytes"] * 1e6), recipe["settings"]["held_out_fraction"])
    length = options.prefix + options.scored
    text = pack(held_out, tokenizer, max(length, 960), 1, tokenizer.eos_token_id).tokens[: options.sequences].long()
    texts = {"ce": text[:, :length], "ce_repeated": periodic(text, seed=0)[0][:, :length]}
    dense = with_softcap(AutoModelForCausalLM.from_pretrained(options.dense, dtype="auto")).eval()
    full = dense_cache_bytes(dense.config, options.prefix)
    rows = []

    def add(system: str, cache: int, score) -> None:
        found = {name: score(rows=tokens, prefix=options.prefix) for name, tokens in texts.items()}
        rows.append({"system": system, "cache_bytes": cache, "cache_percent": 100 * cache / full, **found})
        print(json.dumps(rows[-1]), flush=True)
        write_rows(options.output, rows, prefix=options.prefix, scored=options.scored, sequences=len(text))

    add("dense", full, partial(continuation_loss, dense))
    budgets = set()
    for directory in options.photon:
        config = read_config(directory)
        photon = AutoModelForCausalLM.from_pretrained(directory, config=config, dtype="auto").eval()
        size = cache_bytes(photon.config, options.prefix)
        budgets.add(size.growing + size.constant)
        name = f"{directory.parent.name}/{directory.name}"
        add(name, size.growing + size.constant, partial(continuation_loss, photon))
    for budget in sorted(budgets):
        for name in PRESSES:
            press = press_for(dense, name, 1 - budget / full)
            add(name, budget, partial(continuation_loss, dense, press=press))


if __name__ == "__main__":
    main_wrapper(main)
