"""Score models on tasks of lm-evaluation-harness, side by side: the dense model and its PHOTON, or any others.

photon-train evaluate --model meta-llama/Llama-3.2-1B runs/llama-1b/export --tasks hellaswag arc_easy
"""

from __future__ import annotations

import argparse
from pathlib import Path

from photon_train.cli import main_wrapper


def make_parser(prog: str = "photon-train evaluate") -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, nargs="+", help="directories or hub ids, dense or PHOTON")
    parser.add_argument("--tasks", required=True, nargs="+", help="names, as `lm_eval ls tasks` lists them")
    parser.add_argument("--include-path", type=Path, help="directory with tasks of your own")
    parser.add_argument("--num-fewshot", type=int, help="examples before each question (the task's own)")
    parser.add_argument("--limit", type=int, help="questions per task (all)")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences per forward pass (8)")
    parser.add_argument("--device", help="cpu, cuda, ... (a GPU if there is one)")
    parser.add_argument("--dtype", default="auto", help="auto (the checkpoint's), float32, bfloat16 or float16")
    parser.add_argument("--output", type=Path, help="JSON to write: rows, machine, versions, commit")
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
    import torch
    from rich.console import Console
    from rich.table import Table
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import photon_train.models  # noqa: F401  registers PHOTON with the Auto classes
    from photon_train.checkpoints import first_line
    from photon_train.errors import PhotonError
    from photon_train.evaluation.harness import harness_scores, open_tasks
    from photon_train.evaluation.report import write_rows

    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    manager = open_tasks(options.tasks, options.include_path)
    settings = (options.tasks, manager, options.num_fewshot, options.limit, options.batch_size)
    rows, table = [], Table("Task", "Metric", *options.model)
    for name in options.model:
        try:
            model = AutoModelForCausalLM.from_pretrained(name, dtype=options.dtype).to(device).eval()
        except (ValueError, OSError) as error:
            raise PhotonError(f"--model {name}: {first_line(error)}") from error
        scores = harness_scores(model, AutoTokenizer.from_pretrained(name), *settings)
        rows += [{"model": name, "task": task, **metrics} for task, metrics in scores.items()]
    for task in scores:
        mine = [row for row in rows if row["task"] == task]
        for metric in [key for key in scores[task] if "stderr" not in key]:
            table.add_row(task, metric.removesuffix(",none"), *[f"{row[metric]:.4f}" for row in mine])
    Console().print(table)
    if options.output is not None:
        write_rows(options.output, rows, limit=options.limit, num_fewshot=options.num_fewshot)


if __name__ == "__main__":
    main_wrapper(main)
