"""Pretrain the small dense Llama that the quality study converts, one that uses its context.

python tools/pretrain_dense.py --output runs/study/dense

The text is Python: the standard library and the sources of the installed packages, held out by file. A first stage on
short sequences, half of them periodic, makes retrieval appear early; a second one on long sequences stretches it. The
copy gain is watched on the way. Two runs with the same settings and packages give the same model (to rounding).
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import torch

from lib.copying import copy_gain
from lib.repeats import Repeats
from lib.study_text import study_documents
from photon_train.cli import main_wrapper
from photon_train.data.corpora import split_documents
from photon_train.data.packing import pack
from photon_train.data.pretrain import PretrainSettings, Stage, pretrain, train_tokenizer
from photon_train.evaluation.perplexity import evaluate_loss
from photon_train.files import atomic_directory, atomic_write_text

TOKENIZER_CHARACTERS = 15_000_000
PROBE_SEQUENCES = 32  # of held-out text, for the cross-entropy on the way


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="directory to create, in Hugging Face format")
    parser.add_argument("--megabytes", type=float, default=60.0, help="text to read")
    parser.add_argument("--held-out", type=float, default=0.02, help="share of the files that is held out")
    parser.add_argument("--vocab-size", type=int, default=1024)
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--intermediate-size", type=int, default=256)
    parser.add_argument("--short", type=int, nargs=3, default=(256, 32, 1400), metavar=("TOKENS", "BATCH", "STEPS"))
    parser.add_argument("--long", type=int, nargs=3, default=(1024, 8, 1200), metavar=("TOKENS", "BATCH", "STEPS"))
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--probe-every", type=int, default=200, help="steps between measurements of the copy gain")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    options = arguments()
    settings = PretrainSettings(
        vocab_size=options.vocab_size,
        hidden_size=options.hidden_size,
        num_layers=options.layers,
        num_heads=options.heads,
        num_kv_heads=options.kv_heads,
        intermediate_size=options.intermediate_size,
        held_out_fraction=options.held_out,
        steps=options.short[2] + options.long[2],
        learning_rate=options.learning_rate,
        warmup_steps=100,
        seed=options.seed,
    )
    documents = study_documents(options.megabytes * 1e6)
    train, held_out = split_documents(documents, options.held_out)
    print(f"{len(train)} documents to train on, {len(held_out)} held out", flush=True)
    share = TOKENIZER_CHARACTERS / sum(len(document.text) for document in train)
    every = max(1, round(1 / share))
    tokenizer = train_tokenizer((document.text for document in train[::every]), settings.vocab_size)
    tokenizer.model_max_length = settings.max_positions
    eos = tokenizer.eos_token_id
    stages = []
    for (length, batch, steps), periodic, spans in ((options.short, 0.5, 0.0), (options.long, 0.25, 0.25)):
        dataset = pack(train, tokenizer, length, 1, eos)
        stages.append(Stage(Repeats(dataset, periodic, spans, seed=options.seed), batch, steps))
    probe = pack(held_out, tokenizer, options.long[0], 1, eos, progress=False)
    history: list[dict[str, float]] = []
    log = options.output.with_name(f"{options.output.name}.log.json")

    def measure(step: int, model: torch.nn.Module) -> None:
        if step % options.probe_every and step != settings.steps:
            return
        model.eval()
        gains = copy_gain(lambda rows: model(input_ids=rows, use_cache=False).logits, probe)
        ce = evaluate_loss(model, probe, 8, PROBE_SEQUENCES).ce
        history.append({"step": step, "ce": ce, **{f"copy_{distance}": gain for distance, gain in gains.items()}})
        model.train()
        print(json.dumps(history[-1]), flush=True)
        atomic_write_text(log, json.dumps(history))

    options.output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_directory(options.output) as directory:
        model = pretrain(settings, stages, eos, on_step=measure)
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        recipe = {"settings": asdict(settings), "short": options.short, "long": options.long}
        recipe |= {"megabytes": options.megabytes, "history": history}
        recipe |= {"tokens": sum(length * batch * steps for length, batch, steps in (options.short, options.long))}
        atomic_write_text(directory / "study.json", json.dumps(recipe, indent=1))


if __name__ == "__main__":
    main_wrapper(main)
