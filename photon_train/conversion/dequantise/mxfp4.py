"""MXFP4 of the OCP Microscaling specification: 4-bit floats (E2M1) in blocks of 32 that share a power of two (E8M0).

A matrix is stored as ``*_blocks`` (rows, blocks, 16), two values a byte, the lower half first, and ``*_scales`` (rows,
blocks), exponents with a bias of 127. Of stacked experts (gpt-oss) each is stored as (outputs, inputs), which the model
holds turned round: ``[E, inputs, outputs]``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from photon_train.conversion.dequantise.interface import check_dtype, check_shape, need_part
from photon_train.conversion.safetensors_io import TensorInfo
from photon_train.errors import PhotonError

_BLOCK = 32
_BIAS = 127
_NAN = 255  # the one exponent that stands for no number
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_VALUES = torch.tensor([*_MAGNITUDES, *(-value for value in _MAGNITUDES)])


@dataclass(frozen=True)
class Mxfp4:
    """The format; attributes as in `Format`."""

    title: str = "MXFP4"
    ignored: tuple[str, ...] = ()

    @classmethod
    def read(cls, settings: Mapping[str, Any]) -> Mxfp4:
        """The format; its ``quantization_config`` tells nothing that is needed."""
        return cls()

    def parts(self, name: str, shape: tuple[int, ...], stored: Mapping[str, TensorInfo]) -> dict[str, str] | None:
        """See `Format.parts`."""
        # The blocks have the name of the weight, or of its layer where that is not called weight.
        stems = (name, name.removesuffix(".weight"))
        stem = next((stem for stem in stems if f"{stem}_blocks" in stored or f"{stem}_scales" in stored), None)
        if stem is None or name in stored:
            return None
        blocks, scales = f"{stem}_blocks", f"{stem}_scales"
        file = stored[blocks if blocks in stored else scales].file
        *rows, columns = _as_stored(shape)
        count = math.ceil(columns / _BLOCK)
        for part, wanted in ((blocks, (*rows, count, _BLOCK // 2)), (scales, (*rows, count))):
            info = need_part(part, name, file, stored)
            check_dtype(part, info, torch.uint8)
            check_shape(part, info, wanted)
        return {"blocks": blocks, "scales": scales}

    def dequantise(self, parts: dict[str, torch.Tensor], shape: tuple[int, ...]) -> torch.Tensor:
        """See `Format.dequantise`."""
        blocks, scales = parts["blocks"], parts["scales"]
        if bool((scales == _NAN).any()):
            raise PhotonError("has scales that are no numbers (255): download the checkpoint again")
        result = torch.empty(*blocks.shape, 2)
        result[..., 0] = _VALUES[(blocks & 15).int()]
        result[..., 1] = _VALUES[(blocks >> 4).int()]
        result = torch.ldexp(result.flatten(-2), (scales.int() - _BIAS)[..., None])
        result = result.flatten(-2)[..., : _as_stored(shape)[-1]]
        return result.transpose(1, 2) if len(shape) == 3 else result


def _as_stored(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Rows and columns of a weight of `shape` where its blocks run along the columns."""
    return (shape[0], shape[2], shape[1]) if len(shape) == 3 else shape
