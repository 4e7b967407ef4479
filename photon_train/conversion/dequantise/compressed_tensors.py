"""The 8-bit floats of compressed-tensors (llm-compressor): those of `fp8`, described in groups of layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from photon_train.conversion.dequantise.fp8 import ScaledFloat8
from photon_train.errors import PhotonError

_FORMATS = ("float-quantized", "naive-quantized")


def read(settings: Mapping[str, Any]) -> ScaledFloat8:
    """The format that a ``quantization_config`` describes.

    Raises:
        PhotonError: naming the key, for weights that are no 8-bit floats, that are rotated or sparse, or whose groups
            are scaled in different ways.
    """
    stored = settings.get("format")
    groups = settings.get("config_groups")
    if not isinstance(groups, dict) or not groups or not all(isinstance(group, dict) for group in groups.values()):
        raise PhotonError("quantization_config.config_groups describes no weights: download config.json again")
    for name in (stored, *(group.get("format") for group in groups.values())):
        if name is not None and name not in _FORMATS:
            raise _unread("format", name)
    if settings.get("transform_config"):
        raise _unread("transform_config", "a rotation of the weights")
    sparsity = settings.get("sparsity_config") or {}
    if sparsity.get("format", "dense") != "dense":
        raise _unread("sparsity_config.format", sparsity["format"])
    formats = {_of_group(f"config_groups.{name}.weights", group.get("weights")) for name, group in groups.items()}
    if len(formats) > 1:
        raise _unread("config_groups", "groups that are scaled in different ways")
    return formats.pop()


def _of_group(key: str, weights: Any) -> ScaledFloat8:
    if not isinstance(weights, dict):
        raise PhotonError(f"quantization_config.{key} describes no weights: download config.json again")
    if (weights.get("type"), weights.get("num_bits")) != ("float", 8) or not weights.get("symmetric", True):
        raise _unread(key, f"{weights.get('num_bits')} bits, {weights.get('type')}")
    strategy = weights.get("strategy")
    if strategy in ("tensor", "channel"):
        return ScaledFloat8("FP8")
    if strategy == "block":
        return ScaledFloat8.in_blocks(weights.get("block_structure"), f"{key}.block_structure")
    if strategy == "group":
        return ScaledFloat8.in_blocks([1, weights.get("group_size")], f"{key}.group_size")
    raise _unread(f"{key}.strategy", strategy)


def _unread(key: str, value: Any) -> PhotonError:
    return PhotonError(
        f"quantization_config.{key} is {value}: of compressed-tensors only float-quantized is read; use the "
        "unquantised weights, or a GGUF file of them"
    )
