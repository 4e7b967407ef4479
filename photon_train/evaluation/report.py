"""The report of a run: on screen, as report.md and as report.json."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from photon_train.accounting import format_bytes
from photon_train.errors import PhotonError
from photon_train.evaluation.perplexity import perplexity
from photon_train.files import atomic_write_text
from photon_train.manifest import git_commit, package_versions

JSON_FILE, MARKDOWN_FILE = "report.json", "report.md"
_MODELS = {
    "dense_ce": "Dense model",
    "dense_tuned_ce": "Dense model, fine-tuned the same way",
    "converted_ce": "PHOTON, right after conversion",
    "start_ce": "PHOTON, before this fine-tuning",
    "tuned_ce": "PHOTON, fine-tuned",
}


@dataclass
class Report:
    """What a run found. Whatever is None or empty is left out.

    Attributes:
        model: Dense checkpoint: directory or hub id.
        data: Where the text comes from.
        preset: Conversion preset.
        dense_ce: Held-out cross-entropy (nats per token) of the dense model.
        dense_tuned_ce: Of the dense model after the same fine-tuning.
        converted_ce: Of PHOTON before the first step.
        start_ce: Of a model that was PHOTON already, before the first step.
        tuned_ce: Of PHOTON after the last step.
        held_out_sequences: Sequences that these were measured on.
        parameters: Parameters of the PHOTON model.
        dense_parameters: Parameters of the dense model.
        trainable_parameters: Parameters that were trained (adapters and new modules).
        dense_kv_per_token: Bytes that each token adds to the dense model's cache.
        photon_kv_per_token: Bytes that each token adds to PHOTON's.
        photon_kv_constant: Bytes of PHOTON's bounded caches and buffers, per sequence.
        steps: Optimiser steps of PHOTON's fine-tuning.
        tokens: Tokens read by them.
        seconds: Time of each stage, in order.
        sample_prompt: Prompt of the sample.
        sample_text: What the exported model wrote after it.
        export_check: `photon_train.export.validate.ExportCheck.to_dict()`.
        paths: Where everything lies, by name.
        versions: Versions of the packages (the manifest's).
        machine: `machine()`.
    """

    model: str | None = None
    data: str | None = None
    preset: str | None = None
    dense_ce: float | None = None
    dense_tuned_ce: float | None = None
    converted_ce: float | None = None
    start_ce: float | None = None
    tuned_ce: float | None = None
    held_out_sequences: int | None = None
    parameters: int | None = None
    dense_parameters: int | None = None
    trainable_parameters: int | None = None
    dense_kv_per_token: float | None = None
    photon_kv_per_token: float | None = None
    photon_kv_constant: int | None = None
    steps: int | None = None
    tokens: int | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    sample_prompt: str | None = None
    sample_text: str | None = None
    export_check: dict[str, Any] = field(default_factory=dict)
    paths: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)

    @property
    def held_out(self) -> list[dict[str, Any]]:
        """The measured models in order: ``name``, ``label``, ``cross_entropy`` and ``perplexity``."""
        return [
            {"name": name.removesuffix("_ce"), "label": label, "cross_entropy": ce, "perplexity": perplexity(ce)}
            for name, label in _MODELS.items()
            if (ce := getattr(self, name)) is not None
        ]

    @property
    def kv_ratio(self) -> float | None:
        """Growing cache bytes per token, PHOTON over dense."""
        dense, photon = self.dense_kv_per_token, self.photon_kv_per_token
        return photon / dense if dense and photon is not None else None

    def to_dict(self) -> dict[str, Any]:
        """What is known, and what follows from it, for JSON and the model card."""
        known = {name: value for name, value in asdict(self).items() if value not in (None, {})}
        derived = {"held_out": self.held_out, "kv_ratio": self.kv_ratio}
        return known | {name: value for name, value in derived.items() if value not in (None, [])}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Report:
        """The report that `to_dict` gave."""
        names = {entry.name for entry in fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in names})


def read_report(output_dir: str | os.PathLike[str]) -> Report:
    """Read `report.json` of a run.

    Raises:
        PhotonError: if it is missing or damaged.
    """
    path = Path(output_dir) / JSON_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PhotonError(f"{path} cannot be read ({error}): run the recipe to its end") from error
    if not isinstance(values, dict):
        raise PhotonError(f"{path} is not a report: run the recipe again")
    return Report.from_dict(values)


def write_report(report: Report, output_dir: str | os.PathLike[str]) -> None:
    """Write `report.json` and `report.md` into `output_dir`."""
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    atomic_write_text(output_dir / JSON_FILE, json.dumps(report.to_dict(), indent=2, ensure_ascii=False) + "\n")
    atomic_write_text(output_dir / MARKDOWN_FILE, _markdown(report))


def print_report(report: Report, console: Console | None = None) -> None:
    """Show the report on the screen."""
    console = console or Console(highlight=False)
    for section in _sections(report):
        table = Table(title=section.title, title_justify="left", show_header=any(section.columns))
        for index, column in enumerate(section.columns):
            # Paths are folded and not cut: they are there to be copied.
            table.add_column(column, justify="right" if index and section.numeric else "left", overflow="fold")
        for row in section.rows:
            table.add_row(*map(escape, row))
        console.print(table)
    for title, text in _sample(report):
        console.print(f"[italic]{title}[/italic]\n{escape(text)}\n")


def machine() -> dict[str, Any]:
    """What this process runs on."""
    found: dict[str, Any] = {"platform": platform.platform(), "cpu_count": os.cpu_count()}
    if torch.cuda.is_available():
        found["gpus"] = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return found


def write_rows(path: Path, rows: list[dict[str, Any]], **more: Any) -> None:
    """Write measured `rows` with machine, versions and commit (and `more`) as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {
        **more,
        "machine": machine(),
        "versions": {"python": platform.python_version(), **package_versions()},
        "commit": git_commit(),
        "rows": rows,
    }
    atomic_write_text(path, json.dumps(record, indent=1, ensure_ascii=False) + "\n")


@dataclass(frozen=True)
class _Section:
    """A table: its title, column headings and rows of text."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]
    numeric: bool = True


def _sections(report: Report) -> list[_Section]:
    sections = [
        _quality(report),
        _sizes(report),
        _Section("Time", ("Stage", "Seconds"), [(stage, f"{time:,.1f}") for stage, time in report.seconds.items()]),
        _Section("Where everything lies", ("", ""), list(report.paths.items()), numeric=False),
        _Section("Versions and machine", ("", ""), _environment(report), numeric=False),
    ]
    return [section for section in sections if section.rows]


def _quality(report: Report) -> _Section:
    count = report.held_out_sequences
    title = "Held-out text" if count is None else f"Held-out text ({count:,} sequences)"
    rows = [(row["label"], f"{row['cross_entropy']:.4f}", f"{row['perplexity']:.2f}") for row in report.held_out]
    return _Section(title, ("Model", "Cross-entropy", "Perplexity"), rows)


def _sizes(report: Report) -> _Section:
    rows = [
        ("Parameters of the dense model", report.dense_parameters, "{:,}".format),
        ("Parameters of PHOTON", report.parameters, "{:,}".format),
        ("  trained", report.trainable_parameters, "{:,}".format),
        ("Optimiser steps", report.steps, "{:,}".format),
        ("Tokens read in training", report.tokens, "{:,}".format),
        ("KV cache per token, dense", report.dense_kv_per_token, format_bytes),
        ("KV cache per token, PHOTON (growing part)", report.photon_kv_per_token, format_bytes),
        ("  of the dense model's", report.kv_ratio, "{:.2%}".format),
        ("KV cache, PHOTON, constant part per sequence", report.photon_kv_constant, format_bytes),
        ("Export: weights in", report.export_check.get("dtype"), str),
        ("Export: largest logit difference", report.export_check.get("max_logit_difference"), "{:.2g}".format),
        ("Export: KL to the trained model (nats)", report.export_check.get("kl"), "{:.2g}".format),
    ]
    return _Section("Size", ("", ""), [(label, show(value)) for label, value, show in rows if value is not None])


def _environment(report: Report) -> list[tuple[str, str]]:
    rows = {"Dense model": report.model, "Text": report.data, "Preset": report.preset, **report.machine}
    shown = {name: ", ".join(value) if isinstance(value, list) else value for name, value in rows.items()}
    return [(name, str(value)) for name, value in (shown | report.versions).items() if value is not None]


def _sample(report: Report) -> list[tuple[str, str]]:
    texts = [("Prompt", report.sample_prompt), ("Text that the exported model wrote after it", report.sample_text)]
    return [] if report.sample_text is None else [(title, text) for title, text in texts if text is not None]


def _markdown(report: Report) -> str:
    parts = ["# PHOTON run"]
    for section in _sections(report):
        rule = "|".join(["---", *["---:" if section.numeric else "---"] * (len(section.columns) - 1)])
        lines = [" | ".join(section.columns), rule, *(" | ".join(map(_cell, row)) for row in section.rows)]
        lines = [line if line == rule else f" {line} " for line in lines]
        parts.append(f"## {section.title}\n\n" + "\n".join(f"|{line}|" for line in lines))
    for title, text in _sample(report):
        # Indented, because the text may hold any fence.
        indented = "\n".join(f"    {line}" for line in text.splitlines())
        parts.append(f"## {title}\n\n{indented}")
    return "\n\n".join(parts) + "\n"


def _cell(text: str) -> str:
    """Text as one cell of a Markdown table."""
    return text.strip().replace("|", "\\|").replace("\n", " ")
