"""Score models side by side, dense or PHOTON: on tasks of lm-evaluation-harness, or on long texts.

photon-train evaluate --model meta-llama/Llama-3.2-1B runs/llama-1b/export --tasks hellaswag arc_easy
photon-train evaluate --model meta-llama/Llama-3.2-1B runs/llama-1b/export --long --data held_out/ --lengths 2048 8192

With --long: cross-entropy by position, and RULER's retrieval tasks in haystacks of your text, by length and depth.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from photon_train.cli import main_wrapper
from photon_train.commands import place

# Columns of --long that are shown; the JSON has all.
_SHOWN = {
    "ce": "cross-entropy",
    "ce_beyond_window": "cross-entropy beyond {beyond} tokens",
    "ruler": "RULER, mean",
    "needle": "single needle",
    "needle_nll": "single needle, nats per token",
}


def make_parser(prog: str = "photon-train evaluate") -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", required=True, nargs="+", type=place, help="directories, hub ids or GGUF files, dense or PHOTON"
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--tasks", nargs="+", help="names, as `lm_eval ls tasks` lists them")
    what.add_argument("--long", action="store_true", help="long texts and retrieval in them")
    parser.add_argument("--batch-size", type=int, help="sequences per forward pass (8; with --long, prompts: 4)")
    parser.add_argument("--device", help="cpu, cuda, ... (a GPU if there is one)")
    parser.add_argument("--dtype", default="auto", help="auto (the checkpoint's), float32, bfloat16 or float16")
    parser.add_argument("--output", type=place, help="JSON to write: rows, machine, versions, commit")
    harness = parser.add_argument_group("with --tasks")
    harness.add_argument("--include-path", type=place, help="directory with tasks of your own")
    harness.add_argument("--num-fewshot", type=int, help="examples before each question (the task's own)")
    harness.add_argument("--limit", type=int, help="questions per task (all)")
    long = parser.add_argument_group("with --long")
    long.add_argument(
        "--data", type=place, help="text that no model was trained on, as for conversion (Python's standard library)"
    )
    long.add_argument("--lengths", nargs="+", type=int, default=[2048, 8192], help="tokens of a text (2048 8192)")
    long.add_argument("--sequences", type=int, default=8, help="texts per length (8)")
    long.add_argument("--samples", type=int, default=20, help="prompts per retrieval task and length (20)")
    long.add_argument("--chat-template", action="store_true", help="ask in the tokenizer's chat template")
    long.add_argument("--seed", type=int, default=0, help="seed of the prompts (0)")
    long.add_argument("--plot", type=place, help="PNG to draw: single needles by length and depth")
    return parser


def main(argv: list[str] | None = None, prog: str = "photon-train evaluate") -> None:
    """Run the command.

    Args:
        argv: Arguments without the program's name; None takes `sys.argv`.
        prog: Program name that ``--help`` shows.

    Raises:
        PhotonError: for bad input.
    """
    options = make_parser(prog).parse_args(argv)
    if options.long:
        _long(options)
    else:
        _harness(options)


def _models(options: argparse.Namespace) -> Iterator[tuple[str, Any, Any]]:
    """Name, model (on its device, in evaluation mode) and tokenizer of each, one at a time."""
    import torch
    from transformers import AutoModelForCausalLM

    import photon_train.models  # noqa: F401  registers PHOTON with the Auto classes
    from photon_train.checkpoints import first_line, read_tokenizer, with_softcap
    from photon_train.conversion.source import loadable
    from photon_train.errors import PhotonError

    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    for name in options.model:
        source = loadable(name)
        try:
            model = with_softcap(AutoModelForCausalLM.from_pretrained(source, dtype=options.dtype)).to(device).eval()
            tokenizer = read_tokenizer(source)
        except (ValueError, OSError) as error:
            raise PhotonError(f"--model {name}: {first_line(error)}") from error
        yield name, model, tokenizer


def _harness(options: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    from photon_train.evaluation.harness import harness_scores, open_tasks
    from photon_train.evaluation.report import write_rows

    own = None if options.include_path is None else Path(options.include_path)
    manager = open_tasks(options.tasks, own)
    settings = (options.tasks, manager, options.num_fewshot, options.limit, options.batch_size or 8)
    rows, table = [], Table("Task", "Metric", *options.model)
    for name, model, tokenizer in _models(options):
        scores = harness_scores(model, tokenizer, *settings)
        rows += [{"model": name, "task": task, **metrics} for task, metrics in scores.items()]
    for task in scores:
        mine = [row for row in rows if row["task"] == task]
        for metric in [key for key in scores[task] if "stderr" not in key]:
            table.add_row(task, metric.removesuffix(",none"), *[f"{row[metric]:.4f}" for row in mine])
    Console().print(table)
    if options.output is not None:
        write_rows(Path(options.output), rows, limit=options.limit, num_fewshot=options.num_fewshot)


def _long(options: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    from photon_train.config import DataSettings
    from photon_train.data.corpora import read_documents
    from photon_train.data.progress import progress_bar
    from photon_train.evaluation.long import LongSettings, estimate_seconds, evaluate_long, prepare_long
    from photon_train.evaluation.plots import plot_needles
    from photon_train.evaluation.report import write_rows

    settings = LongSettings(
        lengths=tuple(sorted(set(options.lengths))),
        sequences=options.sequences,
        samples=options.samples,
        batch_size=options.batch_size or 4,
        chat_template=options.chat_template,
        seed=options.seed,
    )
    documents = list(read_documents(options.data, DataSettings()))
    console, rows = Console(), []
    for name, model, tokenizer in _models(options):
        inputs = prepare_long(documents, tokenizer, settings)
        minutes = estimate_seconds(model, inputs) / 60
        console.print(f"{name}: {inputs.tokens_read:,} tokens to read, about {minutes:.1f} minutes", soft_wrap=True)
        with progress_bar(True, "of {task.total:,} tokens") as bar:
            task = bar.add_task("reading", total=inputs.tokens_read)

            def on_tokens(count: int, bar: Any = bar, task: Any = task) -> None:
                bar.update(task, advance=count)

            rows += [{"model": name, **row} for row in evaluate_long(model, tokenizer, inputs, on_tokens=on_tokens)]
    table = Table("Tokens", "", *options.model)
    for length in settings.lengths:
        mine = [row for row in rows if row["length"] == length]
        for key, label in _SHOWN.items():
            cells = ["-" if row[key] is None else f"{row[key]:.4f}" for row in mine]
            table.add_row(f"{length:,}", label.format(beyond=settings.beyond), *cells)
        for task in mine[0]["ruler_tasks"]:
            table.add_row(f"{length:,}", f"  {task}", *[f"{row['ruler_tasks'][task]:.4f}" for row in mine])
    console.print(table)
    if options.output is not None:
        write_rows(Path(options.output), rows, data=options.data, settings=asdict(settings))
    if options.plot is not None:
        plot_needles(rows, Path(options.plot))


if __name__ == "__main__":
    main_wrapper(main)
