"""From a ``quantization_config`` to the format that reads it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from photon_train.conversion.dequantise import bitsandbytes, compressed_tensors
from photon_train.conversion.dequantise.fp8 import ScaledFloat8
from photon_train.conversion.dequantise.interface import Format
from photon_train.conversion.dequantise.mxfp4 import Mxfp4
from photon_train.errors import PhotonError

_READERS: dict[str, Callable[[Mapping[str, Any]], Format]] = {
    "bitsandbytes": bitsandbytes.read,
    "compressed-tensors": compressed_tensors.read,
    "fbgemm_fp8": ScaledFloat8.read,
    "fp8": ScaledFloat8.read,
    "mxfp4": Mxfp4.read,
}


METHODS = frozenset(_READERS)
"""What `quant_method` may be."""


def method_of(settings: Any) -> str | None:
    """The method that a ``quantization_config`` names."""
    if not isinstance(settings, dict):
        return None
    if "quant_method" not in settings and (settings.get("load_in_4bit") or settings.get("load_in_8bit")):
        return "bitsandbytes"  # which gave no name at first
    return str(settings.get("quant_method"))


def format_of(settings: Any) -> Format:
    """The format that the ``quantization_config`` of a ``config.json`` describes.

    Raises:
        PhotonError: with the way round, for a method that is not read (GPTQ, AWQ, ...) and settings that are not.
    """
    method = method_of(settings)
    if method not in METHODS:
        raise PhotonError(
            f"quantised checkpoints of quant_method {method!r} cannot be converted, only those of "
            f"{', '.join(sorted(METHODS))}: use the unquantised weights, or a GGUF file of them"
        )
    return _READERS[method](settings)
