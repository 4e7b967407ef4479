"""The weights of bitsandbytes: 4 bits by a table of 16 values (nf4, fp4), or 8-bit integers with a factor per row."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from photon_train.conversion.dequantise.interface import check_dtype, check_shape, need_part
from photon_train.conversion.safetensors_io import TensorInfo
from photon_train.errors import PhotonError

_TABLES = ("nf4", "fp4")
_STATE = ".quant_state.bitsandbytes__"
_NESTED = ("nested_absmax", "nested_quant_map")
_DAMAGED = "download the checkpoint again"


@dataclass(frozen=True)
class Bits4:
    """Flat blocks of a weight, each scaled by its largest magnitude, which may itself be quantised to 8 bits.

    The matrix is cut into blocks as it lies in memory, so a block may span rows and the last may be shorter.
    """

    title: str = "bitsandbytes 4-bit"
    ignored: tuple[str, ...] = ()

    def parts(self, name: str, shape: tuple[int, ...], stored: Mapping[str, TensorInfo]) -> dict[str, str] | None:
        """See `Format.parts`."""
        info = stored.get(name)
        state = next((f"{name}{_STATE}{table}" for table in _TABLES if f"{name}{_STATE}{table}" in stored), None)
        if info is None or (state is None and info.dtype != torch.uint8):
            return None
        found = {"weight": name, "state": state or f"{name}{_STATE}nf4"}
        found |= {role: f"{name}.{role}" for role in ("absmax", "quant_map")}
        for part in found.values():
            need_part(part, name, info.file, stored)
        # Whatever type the bytes were saved as (`bnb_4bit_quant_storage`): two weights are in each.
        if info.dtype is None or info.numel * info.dtype.itemsize != math.ceil(math.prod(shape) / 2):
            raise PhotonError(
                f"{info.file}: tensor {name} holds another number of 4-bit values than config.json's shape "
                f"{list(shape)}: they do not belong together; download both again"
            )
        check_shape(found["quant_map"], stored[found["quant_map"]], (16,))
        if stored[found["absmax"]].dtype == torch.uint8:
            for role in _NESTED:
                found[role] = f"{name}.{role}"
                check_dtype(found[role], need_part(found[role], name, info.file, stored), torch.float32)
            check_shape(found[_NESTED[1]], stored[found[_NESTED[1]]], (256,))
        else:
            check_dtype(found["absmax"], stored[found["absmax"]], torch.float32)
        return found

    def dequantise(self, parts: dict[str, torch.Tensor], shape: tuple[int, ...]) -> torch.Tensor:
        """See `Format.dequantise`."""
        state = _read_state(parts["state"])
        if tuple(state["shape"]) != shape:
            raise PhotonError(f"has a quant_state of shape {state['shape']}, config.json calls for {list(shape)}")
        absmax = parts["absmax"]
        if _NESTED[0] in parts:
            table = parts[_NESTED[1]]
            absmax = _scale_blocks(table[absmax.int()], parts[_NESTED[0]], state["nested_blocksize"])
            absmax += state["nested_offset"]
        packed = parts["weight"].flatten().view(torch.uint8)
        result = torch.empty(len(packed), 2)
        result[:, 0] = parts["quant_map"].float()[(packed >> 4).int()]  # the upper half comes first
        result[:, 1] = parts["quant_map"].float()[(packed & 15).int()]
        return _scale_blocks(result.flatten()[: math.prod(shape)], absmax, state["blocksize"]).view(shape)


@dataclass(frozen=True)
class Bits8:
    """Integers with the largest magnitude of each row (``SCB``), which 127 stands for."""

    title: str = "bitsandbytes 8-bit"
    ignored: tuple[str, ...] = ()

    def parts(self, name: str, shape: tuple[int, ...], stored: Mapping[str, TensorInfo]) -> dict[str, str] | None:
        """See `Format.parts`."""
        info = stored.get(name)
        if info is None or info.dtype != torch.int8:
            return None
        check_shape(name, info, shape)
        module = name.removesuffix("weight")
        scale = need_part(f"{module}SCB", name, info.file, stored)
        check_shape(f"{module}SCB", scale, shape[:1])
        check_dtype(f"{module}SCB", scale, torch.float32)
        found = {"weight": name, "scale": f"{module}SCB"}
        if f"{module}weight_format" in stored:
            found["format"] = f"{module}weight_format"
        return found

    def dequantise(self, parts: dict[str, torch.Tensor], shape: tuple[int, ...]) -> torch.Tensor:
        """See `Format.dequantise`."""
        if "format" in parts and bool(parts["format"].any()):
            raise PhotonError(
                "is stored in tiles for one kind of GPU (weight_format is not 0): save it again with bitsandbytes 0.45 "
                "or later, or use the unquantised weights"
            )
        return parts["weight"].float() * (parts["scale"] / 127)[:, None]


def read(settings: Mapping[str, Any]) -> Bits4 | Bits8:
    """The format that a ``quantization_config`` describes.

    Raises:
        PhotonError: if it names neither 4 nor 8 bits.
    """
    for bits, found in ((4, Bits4), (8, Bits8)):
        if settings.get(f"load_in_{bits}bit"):
            kind = settings.get("bnb_4bit_quant_type", "")
            return found(f"{found.title} {kind}".strip()) if bits == 4 else found()
    raise PhotonError("quantization_config says neither load_in_4bit nor load_in_8bit: download config.json again")


def _read_state(stored: torch.Tensor) -> dict[str, Any]:
    """The JSON text in the bytes of ``quant_state``, with the keys that are used checked."""
    try:
        state = json.loads(bytes(stored.flatten().view(torch.uint8).tolist()).decode())
        sizes = [state["blocksize"], *state["shape"], state.get("nested_blocksize", 1)]
        sound = all(type(size) is int and size > 0 for size in sizes)
        state["nested_offset"] = float(state.get("nested_offset", 0.0))
    except (ValueError, TypeError, KeyError, AttributeError):
        sound = False
    if not sound:
        raise PhotonError(f"has a quant_state that cannot be read: {_DAMAGED}")
    return state


def _scale_blocks(values: torch.Tensor, factors: torch.Tensor, size: int) -> torch.Tensor:
    """Flat `values` (n,), changed in place: each block of `size` by its factor of `factors` (ceil(n / size),).

    Raises:
        PhotonError: if there are not as many factors as blocks.
    """
    if factors.shape != (math.ceil(len(values) / size),):
        raise PhotonError(f"has {factors.numel()} factors for {len(values)} values in blocks of {size}: {_DAMAGED}")
    whole = len(values) // size
    values[: whole * size].view(whole, size).mul_(factors[:whole, None])
    values[whole * size :] *= factors[whole:]  # one factor, or none of none
    return values
