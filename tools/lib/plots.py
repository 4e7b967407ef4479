"""Plots of studies and benchmarks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from photon_train.evaluation.plots import new_figure, save_figure


def plot_quality(rows: list[dict[str, Any]], output: Path) -> None:
    """Draw quality against growing cache: recovered share on periodic text, and cross-entropy, per row of a study.

    What is much worse than the dense model with a window stands at the edge, hollow: the axes are for the others.

    Args:
        rows: Of `tools/compare_plans.py`.
        output: PNG to write; it appears when it is complete.
    """
    figure = new_figure(12, 5)
    left, right = figure.subplots(1, 2)
    names = list(dict.fromkeys(row["name"] for row in rows))
    worst = 1.1 * max((r["ce_beyond_window"] for r in rows if r["plan"] == "dense-window"), default=math.inf)
    for axes, column, label, low, high in (
        (left, "recovered_repeated", "recovered share of the window's loss, repeated text", -0.25, math.inf),
        (right, "ce_beyond_window", "cross-entropy beyond the window (nats)", -math.inf, worst),
    ):
        for index, name in enumerate(names):
            # The second ten names have the colours of the first with other markers.
            marker = ("os^Dv<>P*XDvPX*^so><")[index % 20]
            style = {"marker": marker, "linestyle": "", "color": f"C{index % 10}", "alpha": 0.8}
            points = [(r["kv_growing_percent"], r[column]) for r in rows if r["name"] == name and r[column] is not None]
            for inside in (True, False):
                drawn = [(x, min(max(y, low), high)) for x, y in points if (low <= y <= high) == inside]
                if drawn:
                    fill = "full" if inside else "none"
                    label_once = name if inside or all(not low <= y <= high for _, y in points) else None
                    axes.plot(*zip(*drawn, strict=True), fillstyle=fill, label=label_once, **style)
        axes.set_xscale("symlog", linthresh=1)
        axes.set_xlabel("growing KV cache, % of the dense model's")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    left.legend(*right.get_legend_handles_labels(), fontsize=7, loc="center left")
    save_figure(figure, output)


def plot_training(rows: list[dict[str, Any]], output: Path) -> None:
    """Draw tokens/s and peak memory of fine-tuning against the context, per system.

    Args:
        rows: Of `tools/bench_training.py`.
        output: PNG to write; it appears when it is complete.
    """
    figure = new_figure(10, 4.5)
    panels = figure.subplots(1, 2)
    columns = (("tokens_per_s", 1, "tokens/s"), ("peak_bytes", 2**20, "peak memory (MiB)"))
    for axes, (column, unit, label) in zip(panels, columns, strict=True):
        for name in dict.fromkeys(row["system"] for row in rows):
            points = [(row["context"], row[column] / unit) for row in rows if row["system"] == name]
            axes.plot(*zip(*points, strict=True), marker="o", label=name)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("context (tokens)")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    panels[0].legend()
    save_figure(figure, output)


def plot_inference(rows: list[dict[str, Any]], output: Path) -> None:
    """Draw the decoding ratio to the dense model against the context, per system.

    Batches of one row and shared prompts are left out; where a context was measured with several batches, each
    system's best is drawn, else the largest.

    Args:
        rows: Of `tools/bench_inference.py`.
        output: PNG to write; it appears when it is complete.
    """
    shown = [row for row in rows if row["decode_ratio"] and row["mode"] != "multi-query" and row["batch"] > 1]
    shown.sort(key=lambda row: (row["batches"] == "best", row["batch"]))
    figure = new_figure(7, 4.5)
    axes = figure.subplots()
    for index, name in enumerate(dict.fromkeys(row["system"] for row in rows)):
        points = {row["context"]: row["decode_ratio"] for row in shown if row["system"] == name}
        contexts = sorted(points)
        marker, color = "os^Dv<>P"[index % 8], f"C{index}"
        axes.plot(contexts, [points[context] for context in contexts], marker=marker, color=color, label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.set_xlabel("context (tokens)")
    axes.set_ylabel("decoding speed / dense model's")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    save_figure(figure, output)


def plot_frontier(rows: list[dict[str, Any]], output: Path) -> None:
    """Draw quality against growing cache for a real model: excess cross-entropy, and retrieval in percent of dense.

    Filled markers are fine-tuned models. One panel each, one colour per name, one line style per length.

    Args:
        rows: Of `tools/compare_long.py`, the dense model's among them.
        output: PNG to write; nothing is written without the dense model.
    """
    dense = {row["length"]: row for row in rows if row["name"] == "dense"}
    if not dense:
        return
    figure = new_figure(12, 5)
    left, right = figure.subplots(1, 2)
    names = list(dict.fromkeys(row["name"] for row in rows if row["name"] != "dense"))
    for axes, column, label in (
        (left, "ce_beyond_window", "cross-entropy beyond 256 tokens: % above the dense model's"),
        (right, "ruler", "RULER: % of the dense model's"),
    ):
        for row in rows:
            whole = dense.get(row["length"])
            known = whole is not None and whole[column] and row[column] is not None
            if row["name"] == "dense" or not known or row["kv_growing_percent"] is None:
                continue
            value = 100 * row[column] / whole[column] - (100 if axes is left else 0)
            index = names.index(row["name"])
            marker = "os^Dv<>P"[sorted(dense).index(row["length"]) % 8]
            first = row["length"] == min(dense)
            axes.plot(
                row["kv_growing_percent"],
                value,
                marker=marker,
                linestyle="",
                color=f"C{index % 10}",
                fillstyle="full" if row["tokens"] else "none",
                label=row["name"] if first else None,
            )
        axes.axhline(0 if axes is left else 100, color="grey", linewidth=0.8)
        axes.set_xscale("symlog", linthresh=0.5)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_xlabel("growing KV cache, % of the dense model's")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    right.legend(fontsize=7)
    save_figure(figure, output)
