"""Which cells (key-value heads of a layer) need their far attention? Zero-shot, on your own text, in minutes.

python tools/probe_cells.py --model meta-llama/Llama-3.2-1B --data my_texts/ --window 256 --output probe.json

One gradient at half-open gates gives every cell's share of what the window costs, on text beyond the window, periodic
text and needles; a conversion chooses `photon.memory_cells` by it. A heat map of layers and heads is written beside the
JSON.

With `--compare 4 7 11 22` sets of so many cells are kept at full attention, all else restricted, on held-out text:
chosen by this gradient, by the gradient at the dense model (a = 1), and by leaving out one cell at a time, and as many
whole layers as the sets pay for. That takes a pass per cell, and about ten times as long.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from lib.kept_cells import Restriction, best_layers, plot_cells
from photon_train.cli import main_wrapper
from photon_train.config import PhotonSettings, load_config
from photon_train.conversion.cells import CellProbe, ProbeText
from photon_train.conversion.graft import format_cells, memory_candidates
from photon_train.conversion.source import DenseCheckpoint
from photon_train.data.progress import progress_bar
from photon_train.evaluation.report import write_rows
from photon_train.pipeline.choose import SEQUENCES, WINDOWS, probe_texts, run_probe
from photon_train.pipeline.console import make_console
from photon_train.pipeline.prepare import load_text, load_tokenizer

DENSE_GATE = 1.0
# Leaving one out takes a pass per cell and sequence.
FEW = {"text": 2, "periodic": 1, "needles": 2}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="dense checkpoint: a directory or a hub id")
    parser.add_argument("--data", default=None, help="text, as for the recipe; default: the standard library")
    parser.add_argument("--window", type=int, default=256, help="tokens that a restricted layer looks back on")
    parser.add_argument("--sinks", type=int, default=4, help="first tokens that stay visible")
    parser.add_argument("--seq-len", type=int, default=None, help="tokens per sequence; default: eight windows")
    parser.add_argument("--sequences", type=int, nargs=3, default=list(SEQUENCES.values()), metavar=tuple(SEQUENCES))
    parser.add_argument("--seed", type=int, default=0, help="draws the sequences")
    parser.add_argument("--compare", type=int, nargs="+", default=[], metavar="CELLS", help="sizes of kept sets")
    parser.add_argument("--output", type=Path, default=None, help="JSON to write, with a plot beside it")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    length = options.seq_len or WINDOWS * options.window
    settings = ["--model", options.model, "--train.seq_len", str(length), "--train.max_steps", "1"]
    # Enough documents of a small collection for another text to compare on.
    settings += ["--dataset.held_out_fraction", "0.3"]
    settings += ["--data", options.data] if options.data else []
    config = load_config(settings, prog="probe_cells.py", description="")
    checkpoint = DenseCheckpoint.open(options.model, config.hub.revision, config.hub.token)
    tokenizer = load_tokenizer(checkpoint.directory, checkpoint.config.vocab_size, config.dataset)
    text = load_text(config, tokenizer, 1, 1, True)

    def draw(dataset: Any, counts: dict[str, int]) -> list[ProbeText]:
        generator = torch.Generator().manual_seed(options.seed)
        return probe_texts(dataset, tokenizer, options.window, length, generator, counts)

    counts = dict(zip(SEQUENCES, options.sequences, strict=True))
    texts = draw(text.train, counts)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(checkpoint.directory, dtype="auto", attn_implementation="photon")
    model, layers = model.to(device).eval(), memory_candidates(checkpoint.config, PhotonSettings())
    began = time.perf_counter()
    probe = run_probe(model, texts, options.window, options.sinks, layers)
    seconds = time.perf_counter() - began
    make_console().print(probe.table())
    # With the probe itself: `CellProbe.from_json` reads the file.
    record = {"model": Path(options.model).name, "length": length, **json.loads(probe.to_json())}
    record |= {"sequences": counts, "dtype": str(model.dtype).removeprefix("torch."), "seed": options.seed}
    rows = []
    if options.compare:
        held_out = Restriction(model, draw(text.held_out, counts), options.window, options.sinks, layers)
        record |= {"held_out": {"dense": held_out.dense, "restricted": held_out.restricted}}
        rankings, times = _rankings(model, probe, seconds, texts, held_out)
        record["rankings"] = {
            name: {**times[name], "scores": found.scores, "losses": {n: asdict(x) for n, x in found.losses.items()}}
            for name, found in rankings.items()
        }
        rows = _compare(rankings, held_out, options.compare)
    if options.output is not None:
        if options.compare:
            write_rows(options.output, rows, **record)
        else:
            write_rows(options.output, _cell_rows(probe), **record, seconds=seconds)
        plot_cells(probe, options.output.with_suffix(".png"))


def _cell_rows(probe: CellProbe) -> list[dict[str, Any]]:
    """A row per cell, the best first."""
    scores = probe.scores
    cells = [(layer, head) for layer, heads in enumerate(scores) for head in range(len(heads))]
    cells.sort(key=lambda cell: -scores[cell[0]][cell[1]])
    return [
        {
            "layer": layer,
            "head": head,
            "score": scores[layer][head],
            **{name: -loss.gradients[layer][head] / loss.cost for name, loss in probe.counted.items()},
        }
        for layer, head in cells
    ]


def _rankings(
    model: torch.nn.Module, probe: CellProbe, seconds: float, texts: list[ProbeText], held_out: Restriction
) -> tuple[dict[str, CellProbe], dict[str, dict[str, Any]]]:
    """The probe and what it is compared with, and what each took: seconds, and seconds per sequence."""
    rankings, times = {"gradient at 0.5": probe}, {}
    sequences = sum(len(text.tokens) for text in texts)
    times["gradient at 0.5"] = {"seconds": seconds, "seconds_per_sequence": seconds / sequences}
    began, layers = time.perf_counter(), held_out.layers
    rankings["gradient at 1"] = run_probe(model, texts, probe.window, probe.num_sinks, layers, DENSE_GATE)
    took = time.perf_counter() - began
    times["gradient at 1"] = {"seconds": took, "seconds_per_sequence": took / sequences}
    few = [ProbeText(each.name, each.tokens[: FEW[each.name]], each.targets[: FEW[each.name]]) for each in texts]
    began = time.perf_counter()
    with progress_bar(True, "of {task.total} cells") as bar:
        task = bar.add_task("leaving one out", total=len(layers) * held_out.heads)
        restriction = Restriction(model, few, probe.window, probe.num_sinks, layers)
        rankings["leaving one out"] = restriction.leave_one_out(lambda: bar.update(task, advance=1))
    took, sequences = time.perf_counter() - began, sum(len(text.tokens) for text in few)
    times["leaving one out"] = {"seconds": took, "seconds_per_sequence": took / sequences}
    return rankings, times


def _compare(rankings: dict[str, CellProbe], held_out: Restriction, sizes: list[int]) -> list[dict[str, Any]]:
    """A row per kept set, with what it recovers on held-out text."""
    sets = []
    for name, ranking in rankings.items():
        sets += [(name, "cells", ranking.best_cells(size, held_out.layers)) for size in sizes]
    whole = sorted({max(1, round(size / held_out.heads)) for size in sizes})
    sets += [("gradient at 0.5", "layers", best_layers(rankings["gradient at 0.5"], count)) for count in whole]
    sets += [("leaving one out", "layers", best_layers(rankings["leaving one out"], count)) for count in whole]
    rows, console = [], make_console()
    all_cells = len(held_out.layers) * held_out.heads
    with progress_bar(True, "of {task.total} kept sets") as bar:
        task = bar.add_task("measuring", total=len(sets))
        for name, grain, kept in sets:
            cells = format_cells(kept)
            rows.append(
                {
                    "chosen_by": name,
                    "grain": grain,
                    "cells": len(cells),
                    "growing_percent": 100 * len(cells) / all_cells,
                    **held_out.recovered(kept),
                    "kept": cells,
                }
            )
            shares = ", ".join(f"{text} {share:.0%}" for text, share in rows[-1].items() if text in SEQUENCES)
            console.print(f"{name}, {len(cells)} cells ({grain}): {shares}")
            bar.update(task, advance=1)
    return rows


if __name__ == "__main__":
    main_wrapper(main)
