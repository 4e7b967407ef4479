"""The conversion as data: for every target tensor its sources and operator (DESIGN 4)."""

from __future__ import annotations

import json
import math
import re
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from rich.table import Table
from transformers import PretrainedConfig

from photon_train.conversion.families import stored_as
from photon_train.conversion.operators import OPERATORS
from photon_train.conversion.presets import LayerMap
from photon_train.conversion.source import DenseCheckpoint
from photon_train.errors import PhotonError
from photon_train.models.configuration_photon import PhotonConfig

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class TensorPlan:
    """One target tensor.

    Attributes:
        target: Its name in the PHOTON checkpoint.
        operator: A name of `operators.OPERATORS`.
        role: What it belongs to (``embedding``, ``token decoder``, ``encoder``, ``chunker``, ...).
        level: The level of the hierarchy, 1 being the lowest; 0 for what the tokens share.
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
        tensors: One entry per target tensor.
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
                found, wanted = tuple(sources[name]), tuple(entry.shape)
                row = entry.arguments["row"] if entry.operator == "split" else 0
                if entry.operator == "split" and row + wanted[0] <= found[0]:
                    found = (wanted[0], *found[1:])
                    split_rows.setdefault(name, set()).update(range(row, row + wanted[0]))
                _need(
                    found == wanted,
                    f"target {entry.target} has shape {list(wanted)}, its source {name} {list(sources[name])}"
                    + (f" and begins at row {row}" if row else ""),
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
    shown = [f"{value:g}" for key, value in entry.arguments.items() if key not in ("seed", "row")]
    return " ".join([entry.operator, *shown])


def _layer_numbers(names: Iterable[str]) -> list[int]:
    found = (re.search(r"\.(?:layers|memory|latent)\.(\d+)\.", name) for name in names)
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


def target_tensors(config: PhotonConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a checkpoint of `config` stores.

    A head that shares the embedding's weight is not stored.
    """
    from photon_train.models.modeling_photon import PhotonForCausalLM

    with torch.device("meta"):
        model = PhotonForCausalLM(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        shapes.pop("lm_head.weight", None)
    return shapes


def resolve_dtype(checkpoint: DenseCheckpoint, dtype: str) -> torch.dtype:
    """The type to write: `dtype`, or the checkpoint's for ``auto``."""
    return checkpoint.dtype if dtype == "auto" else getattr(torch, dtype)


def make_plan(
    checkpoint: DenseCheckpoint, config: PhotonConfig, layers: LayerMap, dtype: str = "auto", seed: int = 0
) -> ConversionPlan:
    """Plan the conversion of a checkpoint, and check the plan.

    Args:
        checkpoint: The dense model.
        config: The target, from `presets.photon_config`.
        layers: Which dense layer each target layer copies, from `presets.layer_map`.
        dtype: Type of the weights: ``auto`` is the checkpoint's.
        seed: Seed of what is drawn.

    Raises:
        PhotonError: if the plan does not fit the checkpoint or the model.
    """
    targets = target_tensors(config)
    tensors = tuple(
        _plan_tensor(name, shape, checkpoint.config, config, layers, seed) for name, shape in targets.items()
    )
    used = {source for entry in tensors for source in entry.sources}
    dropped = tuple(Dropped(name, _drop_reason(name, config)) for name in checkpoint.tensors if name not in used)
    plan = ConversionPlan(
        preset=config.preset,
        family=checkpoint.config.model_type,
        dtype=str(resolve_dtype(checkpoint, dtype)).removeprefix("torch."),
        preserves_dense=config.preset == "graft" and config.conditioning in ("memory", "residual"),
        tensors=tensors,
        dropped=dropped,
    )
    plan.check(targets, {name: info.shape for name, info in checkpoint.tensors.items()})
    return plan


def _drop_reason(name: str, config: PhotonConfig) -> str:
    """Why a dense tensor has no place; empty (which the check refuses) if there is no known reason."""
    if name == "lm_head.weight" and config.tie_word_embeddings:
        return "the head shares the embedding's weight"
    if name.endswith("rotary_emb.inv_freq"):
        return "computed from the configuration"
    return ""


_COPIED = {"model.embed_tokens.weight": "embedding", "model.norm.weight": "final norm", "lm_head.weight": "head"}
_STACK = re.compile(r"model\.levels\.(\d+)\.(encoder|decoder)\.layers\.(\d+)\.(.+)")
_NEW = re.compile(r"model\.levels\.(\d+)\.(?:decoder\.)?(chunker|converter|input_scale|memory|latent)\.(.+)")


def _plan_tensor(
    name: str, shape: tuple[int, ...], dense: PretrainedConfig, config: PhotonConfig, layers: LayerMap, seed: int
) -> TensorPlan:
    if name in _COPIED:
        return TensorPlan(name, "copy", _COPIED[name], 0, shape, (name,))
    if match := _STACK.fullmatch(name):
        level, stack, layer = int(match[1]), match[2], int(match[3])
        role = "token decoder" if stack == "decoder" and level == 0 else stack
        copied = (layers.encoders if stack == "encoder" else layers.decoders)[level][layer]
        source, row = stored_as(dense, f"model.layers.{copied}.{match[4]}")
        operator, arguments = ("copy", {}) if row is None else ("split", {"row": row})
        return TensorPlan(name, operator, role, level + 1, shape, (source,), arguments)
    if name == "model.start.state":
        return TensorPlan(name, "constant", "start state", config.num_levels, shape, (), {"value": 0.0})
    match = _NEW.fullmatch(name)
    _need(match is not None, f"target {name}: no rule makes it")
    level, role, rest = int(match[1]) + 1, match[2].replace("_", " "), match[3]
    operator, arguments = _new_values(name, role, rest, config, seed)
    return TensorPlan(name, operator, role, level, shape, (), arguments)


def _new_values(name: str, role: str, rest: str, config: PhotonConfig, seed: int) -> tuple[str, dict[str, Any]]:
    """Operator and arguments of a tensor that no dense model has."""
    if ".parts." in rest and rest.endswith(".weight"):
        return ("mean_chunk" if role == "latent" else "identity_slots"), {}
    if rest == "proj.weight":
        return ("mean_chunk" if role == "chunker" else "identity_slots"), {}
    if rest == "gate":  # the hourglass's change is what its middle layers did: it enters in full
        return "constant", {"value": 0.0 if config.preset == "graft" else 1.0}
    if role in ("memory", "latent"):
        if rest.endswith("_proj.weight"):
            # Small, not zero: behind a zero gate, a zero projection would get no gradient.
            own_seed = zlib.crc32(f"{seed}:{name}".encode())
            return "normal", {"std": config.initializer_range, "seed": own_seed}
        return "constant", {"value": 0.0}
    return "constant", {"value": 1.0}
