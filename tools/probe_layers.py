"""Which dense layers need their far attention? Zero-shot, on your own text, in minutes.

python tools/probe_layers.py --model meta-llama/Llama-3.2-1B --data my_texts/ --window 256

For every layer: what the loss beyond the window rises by when this layer alone is restricted to the window, and what it
falls by when this layer alone keeps full attention while all others are restricted. `photon.memory_layers` and
`photon.full_attention_layers` belong where the first is large (layers of one circuit win little back alone).
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from lib.quality import periodic
from photon_train.cli import main_wrapper
from photon_train.config import load_config
from photon_train.conversion.probe import probe_layers
from photon_train.conversion.source import DenseCheckpoint
from photon_train.data.progress import progress_bar
from photon_train.evaluation.report import write_rows
from photon_train.pipeline.console import make_console
from photon_train.pipeline.prepare import load_text, load_tokenizer


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="dense checkpoint: a directory or a hub id")
    parser.add_argument("--data", default=None, help="text, as for the recipe; default: the standard library")
    parser.add_argument("--window", type=int, default=256, help="tokens that a restricted layer looks back on")
    parser.add_argument("--sinks", type=int, default=4, help="first tokens that stay visible")
    parser.add_argument("--seq-len", type=int, default=2048, help="tokens per sequence")
    parser.add_argument("--sequences", type=int, default=16, help="held-out sequences")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--repeated", action="store_true", help="repeat the text with periods of 150 to 480 tokens")
    parser.add_argument("--output", type=Path, default=None, help="JSON to write")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    settings = ["--model", options.model, "--train.seq_len", str(options.seq_len), "--train.max_steps", "1"]
    settings += ["--data", options.data] if options.data else []
    config = load_config(settings, prog="probe_layers.py", description="")
    checkpoint = DenseCheckpoint.open(options.model, config.hub.revision, config.hub.token)
    tokenizer = load_tokenizer(checkpoint.directory, checkpoint.config.vocab_size, config.dataset)
    held_out = load_text(config, tokenizer, 1, 1, True).held_out
    tokens = held_out.tokens[: options.sequences].long()
    if options.repeated:
        tokens, _ = periodic(tokens, seed=0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(checkpoint.directory, dtype="auto", attn_implementation="photon")
    with progress_bar(True, "of {task.total} passes") as bar:
        task = bar.add_task("probing", total=None)
        probe = probe_layers(
            model.to(device),
            tokens.split(options.batch_size),
            options.window,
            options.sinks,
            on_pass=lambda done, total: bar.update(task, completed=done, total=total),
        )
    make_console().print(probe.table())
    if options.output is not None:
        rows = [
            {"layer": layer, "alone": alone, "kept": kept, "recovered": recovered}
            for layer, (alone, kept, recovered) in enumerate(zip(probe.alone, probe.kept, probe.recovered, strict=True))
        ]
        ends = {key: value for key, value in asdict(probe).items() if key not in ("alone", "kept")}
        write_rows(options.output, rows, model=options.model, repeated=options.repeated, tokens=tokens.numel(), **ends)


if __name__ == "__main__":
    main_wrapper(main)
