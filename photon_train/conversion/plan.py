"""The conversion as data: for every target tensor its sources and operator (DESIGN 4)."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from rich.table import Table

from photon_train.conversion.operators import OPERATORS
from photon_train.errors import PhotonError

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class TensorPlan:
    """One target tensor.

    Attributes:
        target: Its name in the PHOTON checkpoint.
        operator: A name of `operators.OPERATORS`.
        role: What it belongs to (``embedding``, ``layers``, ``memory chunker``, ``encoder``, ...).
        level: The level of a hierarchical model, 1 being the lowest; 0 for what belongs to none.
        shape: Its shape.
        sources: Dense tensors that the operator reads.
        arguments: The operator's settings.
    """

    target: str
    operator: str
    role: str
    level: int
    shape: tuple[int, ...]
    sources: tuple[str, ...] = ()
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Dropped:
    """A dense tensor that is not used, and why."""

    source: str
    reason: str


@dataclass(frozen=True)
class ConversionPlan:
    """What a conversion writes.

    Attributes:
        preset: Name of the preset.
        family: ``model_type`` of the dense model.
        dtype: Type of every target tensor, e.g. ``bfloat16``.
        preserves_dense: Whether the converted model is the dense model exactly while the window holds the
            whole text.
        tensors: One plan per target tensor.
        dropped: Dense tensors that are left out.
    """

    preset: str
    family: str
    dtype: str
    preserves_dense: bool
    tensors: tuple[TensorPlan, ...]
    dropped: tuple[Dropped, ...] = ()

    @property
    def torch_dtype(self) -> torch.dtype:
        """`dtype` as torch's object."""
        return getattr(torch, self.dtype)

    @property
    def num_bytes(self) -> int:
        """Bytes of all target tensors together."""
        return sum(math.prod(entry.shape) for entry in self.tensors) * self.torch_dtype.itemsize

    def check(self, targets: Shapes, sources: Shapes) -> None:
        """Check that the plan is complete.

        Args:
            targets: Name -> shape of every tensor of the target model.
            sources: Name -> shape of every tensor of the dense checkpoint.

        Raises:
            PhotonError: naming the tensor, if a target is written twice, not at all, unknown or of another
                shape; if a source is unknown, dropped though used, neither used nor dropped, or split and
                not used whole; if an operator is unknown.
        """
        written: set[str] = set()
        used: set[str] = set()
        split_rows: dict[str, set[int]] = {}
        for entry in self.tensors:
            _need(entry.target not in written, f"target {entry.target} is written twice")
            written.add(entry.target)
            _need(entry.target in targets, f"target {entry.target} is not a tensor of the model")
            _need(
                tuple(entry.shape) == tuple(targets[entry.target]),
                f"target {entry.target} has shape {list(entry.shape)}, the model has {list(targets[entry.target])}",
            )
            _need(entry.operator in OPERATORS, f"target {entry.target} has an unknown operator {entry.operator!r}")
            _need(
                len(entry.sources) == (1 if entry.operator in ("copy", "split") else 0),
                f"target {entry.target}: operator {entry.operator} cannot take {len(entry.sources)} sources",
            )
            for name in entry.sources:
                _need(name in sources, f"target {entry.target} reads {name}, which the checkpoint lacks")
                found, wanted, begin = tuple(sources[name]), tuple(entry.shape), ""
                if entry.operator == "split":
                    row = entry.arguments["row"]
                    split_rows.setdefault(name, set()).update(range(row, row + wanted[0]))
                    begin = f" and begins at row {row}"
                    found = (min(wanted[0], found[0] - row), *found[1:])
                _need(
                    found == wanted,
                    f"target {entry.target} has shape {list(wanted)}, its source {name} {list(sources[name])}{begin}",
                )
                used.add(name)
        left = [name for name in targets if name not in written]
        _need(not left, f"target {left[0] if left else ''} is not written ({len(left)} in all)")
        for name, rows in split_rows.items():
            unread = sources[name][0] - len(rows)
            _need(not unread, f"{unread} of the {sources[name][0]} rows of source {name} are not used")
        dropped = {entry.source for entry in self.dropped}
        for entry in self.dropped:
            _need(bool(entry.reason), f"source {entry.source} is dropped without a reason")
            _need(entry.source in sources, f"source {entry.source} is dropped, but the checkpoint lacks it")
            _need(entry.source not in used, f"source {entry.source} is dropped, but used")
        unused = [name for name in sources if name not in used | dropped]
        _need(not unused, f"source {unused[0] if unused else ''} is neither used nor dropped ({len(unused)} in all)")

    def table(self) -> Table:
        """The plan for a screen: tensors of one kind share a row, however many layers there are."""
        kind = "the dense model exactly while the window holds the text" if self.preserves_dense else "not preserved"
        table = Table(
            title=f"Plan: preset {self.preset}, {self.family}, {self.dtype}", caption=f"Dense function: {kind}"
        )
        for column in ("Role", "Level", "Layers", "From", "Operator"):
            table.add_column(column)
        for column in ("Tensors", "Parameters"):
            table.add_column(column, justify="right")
        groups: dict[tuple[str, int, str], list[TensorPlan]] = {}
        for entry in self.tensors:
            groups.setdefault((entry.role, entry.level, _label(entry)), []).append(entry)
        for (role, level, label), entries in groups.items():
            layers = _ranges(_layer_numbers(entry.target for entry in entries))
            sources = [name for entry in entries for name in entry.sources]
            origin = _ranges(_layer_numbers(sources))
            origin = f"dense layers {origin}" if origin else ", ".join(sources)
            size = sum(math.prod(entry.shape) for entry in entries)
            table.add_row(role, str(level or ""), layers, origin, label, str(len(entries)), f"{size:,}")
        reasons: dict[str, int] = {}
        for entry in self.dropped:
            reasons[entry.reason] = reasons.get(entry.reason, 0) + 1
        for reason, count in reasons.items():
            table.add_row("dropped", "", "", "", reason, str(count), "")
        return table

    def to_json(self) -> str:
        """The plan as JSON."""
        return json.dumps(asdict(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> ConversionPlan:
        """Read what `to_json` wrote.

        Raises:
            PhotonError: if the text is not a plan.
        """
        try:
            content = json.loads(text)
            tensors = tuple(
                TensorPlan(**{**entry, "shape": tuple(entry["shape"]), "sources": tuple(entry["sources"])})
                for entry in content.pop("tensors")
            )
            dropped = tuple(Dropped(**entry) for entry in content.pop("dropped"))
            return cls(**content, tensors=tensors, dropped=dropped)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise PhotonError(f"this is not a conversion plan: {error}") from error


def _need(condition: bool, message: str) -> None:
    if not condition:
        raise PhotonError(f"conversion plan: {message}")


def _label(entry: TensorPlan) -> str:
    shown = [f"{value:g}" for key, value in entry.arguments.items() if key != "row"]
    return " ".join([entry.operator, *shown])


def _layer_numbers(names: Iterable[str]) -> list[int]:
    found = (re.search(r"\.layers\.(\d+)\.", name) for name in names)
    return sorted({int(match[1]) for match in found if match})


def _ranges(numbers: list[int]) -> str:
    """``[0, 1, 2, 6]`` -> ``0-2, 6``; an even progression of many -> ``1, 3 ... 79``."""
    steps = {b - a for a, b in zip(numbers, numbers[1:], strict=False)}
    if len(numbers) > 4 and len(steps) == 1 and steps != {1}:
        return f"{numbers[0]}, {numbers[1]} ... {numbers[-1]}"
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
