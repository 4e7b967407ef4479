"""Rows of the quality study against each other: the recovered share and the table."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

# Recovered share -> the cross-entropy that it is computed on.
_RECOVERED = {"recovered": "ce_beyond_window", "recovered_repeated": "ce_repeated"}
_COLUMNS = {
    "ce": ".4f",
    "ce_beyond_window": ".4f",
    "ce_repeated": ".4f",
    "copy_gain": ".3f",
    "recovered": ".0%",
    "recovered_repeated": ".0%",
    "kv_growing_percent": ".2f",
    "kv_constant_bytes": ",.0f",
    "layer_positions": ".2f",
    "flops_per_token": ".3g",
    "parameters": ",.0f",
    "parameters_trainable": ",.0f",
    "tokens": ",.0f",
    "seconds": ",.0f",
}


def add_recovered(rows: list[dict[str, Any]]) -> None:
    """Add the share of the window's loss that each row wins back, where the rows that define it are there.

    ``(window - row) / (window - dense)``, with `dense-window` and `dense-finetuned` trained alike: on the same number
    of tokens (for a row that was not trained, on none: `dense` and the untrained window), averaged over their seeds;
    of several windows, the one next to the row's `window`.
    A dense model trained with other settings has another `name` and is no reference.
    `recovered` is on text beyond the window, `recovered_repeated` on periodic text; None where the window costs less
    than 0.005 nats, which says nothing.
    """
    for share, column in _RECOVERED.items():
        for row in rows:
            alike = [other for other in rows if other["tokens"] == row["tokens"]]
            window = _mean(_nearest(alike, row.get("window")), column)
            dense = _mean(_named(alike, "dense-finetuned" if row["tokens"] else "dense"), column)
            known = window is not None and dense is not None and window - dense >= 0.005
            row[share] = (window - row[column]) / (window - dense) if known else None


def _nearest(rows: list[dict[str, Any]], window: int | None) -> list[dict[str, Any]]:
    """The rows of `dense-window` whose window differs least from `window`, a quarter at most (all if it is unknown)."""
    found = [row for row in rows if row["plan"] == "dense-window"]
    if window is None or not found or any(row.get("window") is None for row in found):
        return found
    least = min(abs(row["window"] - window) for row in found)
    return [row for row in found if abs(row["window"] - window) == least <= window / 4]


def _named(rows: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    return [row for row in rows if row["name"] == name]


def _mean(rows: list[dict[str, Any]], column: str) -> float | None:
    return sum(row[column] for row in rows) / len(rows) if rows else None


def markdown_table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown; seeds of one plan share a line with mean and half the spread."""
    groups: dict[tuple[str, int], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["name"], row["tokens"]].append(row)
    lines = ["| name | seeds | " + " | ".join(_COLUMNS) + " |", "|---|---:|" + "---:|" * len(_COLUMNS)]
    for (name, _), group in groups.items():
        cells = [_cell([row[column] for row in group], form) for column, form in _COLUMNS.items()]
        lines.append(f"| {name} | {len(group)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(values: list[Any], form: str) -> str:
    if None in values:
        return ""
    mean, spread = sum(values) / len(values), (max(values) - min(values)) / 2
    text = format(mean, form)
    return f"{text} ± {spread:{form}}" if spread and format(spread, form).strip("0.,%") else text
