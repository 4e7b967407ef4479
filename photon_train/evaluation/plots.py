"""The plots of a run and of its evaluation, and what every plot of ours is drawn with."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from photon_train.errors import PhotonError
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


def plot_needles(rows: list[dict[str, Any]], output: Path) -> None:
    """Draw how often a single needle was found, by the length of the text and the needle's depth: a map per model.

    Args:
        rows: Of `photon_train.evaluation.long.evaluate_long`, each with the ``model`` it is of.
        output: PNG to write; it appears when it is complete.

    Raises:
        PhotonError: if no row has needles.
    """
    rows = [row for row in rows if row["needle_by_depth"]]
    if not rows:
        raise PhotonError("--plot: no needle was hidden; take --samples of at least one")
    models = list(dict.fromkeys(row["model"] for row in rows))
    lengths = sorted({row["length"] for row in rows})
    depths = sorted({depth for row in rows for depth in row["needle_by_depth"]}, key=int)
    figure = new_figure(1.5 + (1.2 + 0.8 * len(lengths)) * len(models), 1.5 + 0.5 * len(depths))
    panels = figure.subplots(1, len(models), squeeze=False, sharey=True)[0]
    for axes, model in zip(panels, models, strict=True):
        found = {row["length"]: row["needle_by_depth"] for row in rows if row["model"] == model}
        values = [[found.get(length, {}).get(depth, math.nan) for length in lengths] for depth in depths]
        image = axes.imshow(values, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        for row, of_depth in enumerate(values):
            for column, value in enumerate(of_depth):
                if not math.isnan(value):
                    axes.text(column, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=8)
        axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], fontsize=7)
        axes.set_yticks(range(len(depths)), [f"{depth}%" for depth in depths])
        axes.set_title(Path(model).name or model, fontsize=8)
        axes.set_xlabel("tokens")
    panels[0].set_ylabel("text before the needle")
    figure.colorbar(image, ax=list(panels), label="share of needles found")
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
