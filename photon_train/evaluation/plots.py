"""The plot of a run, and what every plot of ours is drawn with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from photon_train.files import atomic_file


def plot_losses(metrics: Path, output: Path) -> None:
    """Draw the training loss and the held-out cross-entropy of every training of a run against its steps.

    Args:
        metrics: `metrics.jsonl` of the run.
        output: PNG to write; it appears when it is complete.
    """
    records = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    figure = new_figure(8, 4.5)
    axes = figure.subplots()
    for index, name in enumerate(dict.fromkeys(record["name"] for record in records)):
        for key, style in (("train/loss", {"alpha": 0.4}), ("eval/ce", {"marker": "o"})):
            points = [(r["step"], r[key]) for r in records if r["name"] == name and key in r]
            if points:
                label = f"{name}, {'training loss' if key == 'train/loss' else 'held-out cross-entropy'}"
                axes.plot(*zip(*points, strict=True), color=f"C{index}", label=label, **style)
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("nats per token")
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, output)


def new_figure(width: float, height: float) -> Any:
    """An empty figure, in inches, that is drawn without a display."""
    # matplotlib picks a window system where there is one unless it is asked for a canvas alone.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    return FigureCanvasAgg(Figure(figsize=(width, height), layout="constrained")).figure


def save_figure(figure: Any, output: Path) -> None:
    """Write the figure as PNG; the file appears when it is complete."""
    with atomic_file(output) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
