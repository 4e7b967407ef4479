"""Weights in 8-bit floats, with one factor for each block, row or matrix.

Three ways of saying the same: `quant_method` fp8 with ``weight_scale_inv`` (an inverse for who quantises: weights are
multiplied by it) or ``weight_scale``, and fbgemm_fp8.
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

_WEIGHTS = (torch.float8_e4m3fn, torch.float8_e5m2)
_FACTORS = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu)
_ENDINGS = ("_scale_inv", "_scale")
# Factors of activations and of cached keys and values: the weights are the same without.
_IGNORED = (
    *(".input_scale", ".input_scale_ub", ".activation_scale", ".output_scale"),
    *(".q_scale", ".k_scale", ".v_scale", ".kv_scale"),
)


@dataclass(frozen=True)
class ScaledFloat8:
    """The format.

    Attributes:
        title: What it is called in the plan.
        block: Rows and columns that share a factor; None if whole rows or matrices do.
        ignored: As in `Format`.
    """

    title: str
    block: tuple[int, int] | None = None
    ignored: tuple[str, ...] = _IGNORED

    @classmethod
    def read(cls, settings: Mapping[str, Any]) -> ScaledFloat8:
        """The format that a ``quantization_config`` describes.

        Raises:
            PhotonError: for a block that is none.
        """
        block = settings.get("weight_block_size")
        if block is None:
            return cls("FP8")
        return cls.in_blocks(block, "weight_block_size")

    @classmethod
    def in_blocks(cls, block: Any, key: str) -> ScaledFloat8:
        """The format with blocks of rows and columns, as `key` of the ``quantization_config`` names them.

        Raises:
            PhotonError: unless they are two whole numbers above 0.
        """
        if not isinstance(block, list) or len(block) != 2 or not all(type(n) is int and n > 0 for n in block):
            raise PhotonError(
                f"quantization_config.{key} is {block!r}: it must be two whole numbers, such as [128, 128]"
            )
        return cls(f"FP8 in blocks of {block[0]}x{block[1]}", (block[0], block[1]))

    def parts(self, name: str, shape: tuple[int, ...], stored: Mapping[str, TensorInfo]) -> dict[str, str] | None:
        """See `Format.parts`."""
        info = stored.get(name)
        if info is None or info.dtype not in _WEIGHTS or len(shape) != 2:
            return None
        check_shape(name, info, shape)
        found = [name + ending for ending in _ENDINGS if name + ending in stored]
        scale = found[0] if found else name + _ENDINGS[0 if self.block else 1]
        scale_info = need_part(scale, name, info.file, stored)
        check_dtype(scale, scale_info, *_FACTORS)
        allowed = [(), (1,), (shape[0],), (shape[0], 1)]
        if self.block is not None:
            # A block's factor is one for several rows: a vector would have been made for other weights.
            allowed = [tuple(map(_ceil_div, shape, self.block))]
        check_shape(scale, scale_info, *allowed)
        return {"weight": name, "scale": scale}

    def dequantise(self, parts: dict[str, torch.Tensor], shape: tuple[int, ...]) -> torch.Tensor:
        """See `Format.dequantise`."""
        result, scale = parts["weight"].float(), parts["scale"].float()
        per_row = scale.numel() == shape[0] > 1
        rows, columns = self.block or (1 if per_row else shape[0], shape[1])
        grid = scale.view(_ceil_div(shape[0], rows), -1)
        # Column by column of blocks: factors spelled out for all weights at once would double the memory.
        for index, factors in enumerate(grid.unbind(1)):
            result[:, index * columns : (index + 1) * columns] *= factors.repeat_interleave(rows)[: shape[0], None]
        return result


def _ceil_div(size: int, block: int) -> int:
    return math.ceil(size / block)
