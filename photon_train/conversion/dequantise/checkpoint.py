"""Quantised weights as an ordinary checkpoint: which tensors become which weights, and writing them, one at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from photon_train.conversion.dequantise.interface import Format
from photon_train.conversion.layout import copy_small_files, shard_name, write_index
from photon_train.conversion.safetensors_io import ShardWriter, TensorInfo, is_finite, join_pieces, read_pieces
from photon_train.errors import PhotonError
from photon_train.files import atomic_directory, check_can_write

NOTE = "dequantised.json"
# Raise it when the code makes something else of a checkpoint, so that older caches are not taken for it.
_VERSION = 1
_SUFFIXES = (".json", ".jinja", ".model", ".safetensors", ".txt")
_SHARD_BYTES = 5 * 10**9
_HEAD, _EMBEDDING = "lm_head", "model.embed_tokens.weight"
_COMPUTED = "rotary_emb.inv_freq"  # old checkpoints store it; config.json tells it


@dataclass(frozen=True)
class Quantised:
    """What a plan says of a quantised checkpoint.

    Attributes:
        source: Its directory.
        title: The format.
        dtype: What it is dequantised to.
        bytes_after: Bytes of the weights then.
        num_weights: How many there are.
        num_quantised: How many of them were quantised; None if nothing was downloaded yet.
        bytes_before: Bytes of the stored tensors; None likewise.
    """

    source: str
    title: str
    dtype: str
    bytes_after: int
    num_weights: int
    num_quantised: int | None = None
    bytes_before: int | None = None

    def __str__(self) -> str:
        after = f"{self.dtype}, {_gigabytes(self.bytes_after)}"
        if self.num_quantised is None or self.bytes_before is None:
            return (
                f"The dense checkpoint is quantised: {self.title}. It is dequantised to {after}, once it is downloaded."
            )
        return (
            f"The dense checkpoint is quantised: {self.title}, {self.num_quantised} of {self.num_weights} tensors, "
            f"{_gigabytes(self.bytes_before)}. It is dequantised to {after}, once, into the cache."
        )


@dataclass(frozen=True)
class QuantisedCheckpoint:
    """A checkpoint of quantised weights, sorted by headers; made by `sort_tensors`.

    Attributes:
        directory: Where it lies.
        format: How it is quantised.
        weights: Name -> shape of all weights.
        parts: Weight -> its stored parts, for those that are quantised.
        stored: Every stored tensor.
    """

    directory: Path
    format: Format
    weights: dict[str, tuple[int, ...]]
    parts: dict[str, dict[str, str]]
    stored: dict[str, TensorInfo]

    @property
    def plain(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of the weights that are stored as such."""
        return {name: shape for name, shape in self.weights.items() if name not in self.parts}

    def describe(self, dtype: torch.dtype) -> Quantised:
        """What a plan says of it, when it is dequantised to `dtype`."""
        return replace(
            foretell(str(self.directory), self.format, self.weights, dtype),
            num_quantised=len(self.parts),
            bytes_before=sum(info.numel * info.dtype.itemsize for info in self.stored.values() if info.dtype),
        )

    def key(self, dtype: torch.dtype) -> str:
        """What its dequantised copy depends on: place, size and time of change of every file that is read."""
        files = sorted(path for path in self.directory.iterdir() if path.suffix in _SUFFIXES)
        states = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
        return f"{_VERSION} {self.directory.resolve()} {dtype} {states}"

    def write(self, output: Path, config: Mapping[str, Any], dtype: torch.dtype) -> None:
        """Write the weights, dequantised; one of them is in memory at a time.

        Args:
            output: New directory; it appears whole or not at all.
            config: Content of its ``config.json``.
            dtype: Type of the weights.

        Raises:
            PhotonError: if the disk is too full, or a weight is not finite or its parts contradict each other.
        """
        note = self.describe(dtype)
        check_can_write(output, note.bytes_after, f"the dequantised {self.directory.name}")
        shards: list[dict[str, tuple[int, ...]]] = [{}]
        room = _SHARD_BYTES
        for name, shape in self.weights.items():
            size = math.prod(shape) * dtype.itemsize
            if size > room and shards[-1]:
                shards.append({})
                room = _SHARD_BYTES
            shards[-1][name] = shape
            room -= size
        weight_map = {}
        with atomic_directory(output) as directory:
            for number, shard in enumerate(shards, start=1):
                file = shard_name(number, len(shards))
                with ShardWriter(directory / file, shard, dtype) as writer:
                    for name in shard:
                        writer.write(name, self._pieces(name, dtype))
                        weight_map[name] = file
            write_index(directory, weight_map, note.bytes_after)
            (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            (directory / NOTE).write_text(json.dumps(asdict(note), indent=1) + "\n", encoding="utf-8")
            copy_small_files(self.directory, directory)

    def _pieces(self, name: str, dtype: torch.dtype) -> Iterator[torch.Tensor]:
        """A weight's elements in `dtype`, flat."""
        if name not in self.parts:
            file, pieces = self.stored[name].file, read_pieces(self.stored[name])
        else:
            parts = self.parts[name]
            file = self.stored[next(iter(parts.values()))].file
            try:
                tensors = {role: _whole(self.stored[part]) for role, part in parts.items()}
                pieces = iter([self.format.dequantise(tensors, self.weights[name]).flatten()])
            except PhotonError as error:
                raise PhotonError(f"{file}: tensor {name} {error}") from error
        for piece in pieces:
            cast = piece.to(dtype)
            if not is_finite(piece):
                raise PhotonError(f"{file}: tensor {name} holds NaN or infinite weights; use a sound checkpoint")
            if not is_finite(cast):
                raise PhotonError(
                    f"{file}: tensor {name} holds weights beyond {str(dtype).removeprefix('torch.')}, the dtype that "
                    "config.json names: write bfloat16 there"
                )
            yield cast


def sort_tensors(
    directory: Path, form: Format, expected: Mapping[str, tuple[int, ...]], stored: dict[str, TensorInfo]
) -> QuantisedCheckpoint:
    """Find the stored tensors of every weight; no tensor is read.

    Args:
        directory: Of the checkpoint.
        form: How it is quantised.
        expected: Name -> shape of every weight that ``config.json`` calls for.
        stored: Every stored tensor.

    Raises:
        PhotonError: naming file and tensor, if a part is missing or does not fit, or a stored tensor belongs to none.
    """
    weights = dict(expected)
    if f"{_HEAD}.weight" not in weights and any(name.startswith(f"{_HEAD}.") for name in stored):
        weights[f"{_HEAD}.weight"] = weights[_EMBEDDING]  # stored though it is tied: the conversion compares them
    found = {name: form.parts(name, shape, stored) for name, shape in weights.items()}
    parts = {name: each for name, each in found.items() if each is not None}
    known = {part for each in parts.values() for part in each.values()} | set(weights)
    for name, info in stored.items():
        if name not in known and not name.endswith((_COMPUTED, *form.ignored)):
            raise PhotonError(
                f"{info.file}: tensor {name} belongs to no weight ({form.title}): use the unquantised weights"
            )
    return QuantisedCheckpoint(directory, form, weights, parts, stored)


def foretell(source: str, form: Format, weights: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> Quantised:
    """What a plan says of a quantised checkpoint of which only the configuration is there."""
    name = str(dtype).removeprefix("torch.")
    return Quantised(source, form.title, name, sum(map(math.prod, weights.values())) * dtype.itemsize, len(weights))


def read_note(directory: Path) -> Quantised | None:
    """What was noted when `directory` was written; None if it is no dequantised checkpoint.

    Raises:
        PhotonError: if the note is damaged.
    """
    path = directory / NOTE
    if not path.is_file():
        return None
    try:
        return Quantised(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise PhotonError(f"{path} is damaged: delete {directory}, it is made again") from error


def _whole(info: TensorInfo) -> torch.Tensor:
    return join_pieces(info, read_pieces(info))


def _gigabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:,.2f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:,.2f} MB"
