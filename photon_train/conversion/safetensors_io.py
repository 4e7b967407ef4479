"""The safetensors format in pieces: headers alone, and tensors streamed in both directions.

The library `safetensors` maps whole files or writes tensors that are all in memory. Conversion needs
neither: it checks a file's length against its header before anything is read, and passes tensors of any
size through a buffer of a few megabytes. Format: an unsigned 64-bit little-endian header length, the header
(JSON), then the tensors' bytes (https://huggingface.co/docs/safetensors).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from photon_train.errors import PhotonError

PIECE_BYTES = 16 * 2**20
"""Bytes that one piece of a streamed tensor holds at most."""

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies.

    Attributes:
        shape: Its shape.
        dtype: Its type; None for a type that torch or this package does not know.
        file: The file that holds it; None if only the name is known (nothing was downloaded).
        offset: First byte in the file.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype | None
    file: Path | None
    offset: int = 0

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Read the names, shapes and offsets of a file's tensors, and check that they fill the file.

    The order of the result is the header's.

    Raises:
        PhotonError: if the file is truncated, corrupt or not safetensors; what the library refuses is corrupt here too:
            tensors that overlap, and bytes between them that belong to none.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
        if start.startswith(b"version "):
            raise PhotonError(f"{path} is a Git LFS pointer, not the weights: run `git lfs pull` in its directory")
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > size - 8:
            raise PhotonError(f"{path} is truncated or not safetensors ({size} bytes): download it again")
        raw = file.read(length)
    try:
        header = json.loads(raw, object_pairs_hook=_unique_pairs)
        entries = {
            name: (DTYPES.get(entry["dtype"]), *map(_whole_numbers, (entry["shape"], entry["data_offsets"])))
            for name, entry in header.items()
            if name != "__metadata__"
        }
        in_order = sorted((begin, end, name) for name, (_, _, (begin, end)) in entries.items())
    except _DuplicateKey as error:
        raise PhotonError(f"{path} holds tensor {error} twice: download it again") from None
    except (ValueError, TypeError, KeyError, AttributeError):
        raise PhotonError(f"{path} has a corrupt safetensors header: download it again") from None
    end_of_data = 0
    for begin, end, name in in_order:
        dtype, shape, _ = entries[name]
        size_fits = dtype is None or end - begin == math.prod(shape) * dtype.itemsize
        if not size_fits or begin != end_of_data or end < begin:
            raise PhotonError(f"{path} has a corrupt safetensors header (tensor {name}): download it again")
        end_of_data = end
    tensors = {
        name: TensorInfo(shape, dtype, path, 8 + length + begin) for name, (dtype, shape, (begin, _)) in entries.items()
    }
    expected = 8 + length + end_of_data
    if size != expected:
        state = "truncated" if size < expected else "corrupt"
        raise PhotonError(f"{path} is {state}: {size} bytes instead of {expected}; download it again")
    return tensors


def _whole_numbers(values: object) -> tuple[int, ...]:
    """A list of the header: JSON numbers that are whole and not negative, which `int` alone would not insist on."""
    if not isinstance(values, list) or not all(type(value) is int and value >= 0 for value in values):
        raise ValueError(f"{values!r} are no sizes")
    return tuple(values)


class _DuplicateKey(ValueError):
    """A JSON object that names a key twice."""


def _unique_pairs(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        raise _DuplicateKey(next(name for name in names if names.count(name) > 1))
    return result


def read_pieces(info: TensorInfo, piece_bytes: int = PIECE_BYTES) -> Iterator[torch.Tensor]:
    """Yield a tensor's elements in order, flat, at most `piece_bytes` at a time.

    Read with plain file reads: pages of a memory map would count as the process's memory.
    """
    per_piece = max(1, piece_bytes // info.dtype.itemsize)
    with open(info.file, "rb") as file:
        file.seek(info.offset)
        for begin in range(0, info.numel, per_piece):
            count = min(per_piece, info.numel - begin)
            buffer = bytearray(count * info.dtype.itemsize)
            if file.readinto(buffer) != len(buffer):
                raise PhotonError(f"{info.file} was shortened while it was read: start again")
            yield torch.frombuffer(buffer, dtype=info.dtype)


def join_pieces(info: TensorInfo, pieces: Iterable[torch.Tensor]) -> torch.Tensor:
    """The whole tensor of `info` from its flat pieces."""
    result = torch.empty(info.numel, dtype=info.dtype)
    at = 0
    for piece in pieces:
        result[at : at + piece.numel()] = piece
        at += piece.numel()
    return result.view(info.shape)


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether all values are finite; unlike `isfinite` it needs no second tensor of the same size."""
    low, high = torch.aminmax(tensor)  # both pass NaN on
    return bool(torch.isfinite(low) and torch.isfinite(high))


def check_finite(name: str, tensor: torch.Tensor) -> None:
    """Check a tensor that was cast to the type it is written in.

    Raises:
        PhotonError: if a value is not finite.
    """
    if not is_finite(tensor):
        dtype = str(tensor.dtype).removeprefix("torch.")
        raise PhotonError(f"{name} is not finite in {dtype}: set export.dtype to a wider type, such as bfloat16")


class ShardWriter:
    """Writes one safetensors file, its tensors streamed in the order they were declared.

    Args:
        path: The file to write.
        tensors: Name, shape of every tensor, in the order they will be written.
        dtype: The type of all of them.
    """

    def __init__(self, path: Path, tensors: dict[str, tuple[int, ...]], dtype: torch.dtype) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, shape in tensors.items():
            end = offset + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
            offset = end
        raw = json.dumps(header, separators=(",", ":")).encode()
        raw += b" " * (-len(raw) % 8)  # readers expect the data to start on a multiple of 8 bytes
        self.dtype = dtype
        self._pending = {name: math.prod(shape) for name, shape in tensors.items()}
        self._file = open(path, "wb")  # noqa: SIM115 (closed by __exit__)
        self._file.write(len(raw).to_bytes(8, "little") + raw)

    def write(self, name: str, pieces: Iterable[torch.Tensor]) -> None:
        """Write the next tensor from flat pieces, cast to the file's type.

        Raises:
            ValueError: if `name` is not the next declared tensor or the pieces do not fill it.
            PhotonError: if a value is not finite in the file's type.
        """
        if name != next(iter(self._pending), None):
            raise ValueError(f"{name} is not the next tensor of this file")
        left = self._pending.pop(name)
        for piece in pieces:
            left -= piece.numel()
            cast = piece.to(self.dtype)
            if cast.dtype != piece.dtype:
                check_finite(name, cast)
            # The bytes as such: numpy has no bfloat16.
            self._file.write(cast.contiguous().view(torch.uint8).numpy().data)
        if left:
            raise ValueError(f"{name} was given {-left} elements too many" if left < 0 else f"{name} lacks {left}")

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self._file.flush()
            os.fsync(self._file.fileno())
        self._file.close()
        if kind is None and self._pending:
            raise ValueError(f"tensors never written: {sorted(self._pending)}")
