"""What the package bitsandbytes itself stores for small weights, and makes of it again.

`golden_bitsandbytes.json` beside the tests was written by version 0.50.2, with its functions for CPUs:

    pip install --no-deps --target DIRECTORY bitsandbytes==0.50.2
    PYTHONPATH=DIRECTORY python tests/support/golden_bitsandbytes.py tests/conversion/golden_bitsandbytes.json

Weights are in float32: for bfloat16 that version gives other numbers on CPUs where a row is no whole number of
blocks (it is then further from the weight that was quantised than what the blocks' definition gives).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

# Odd numbers of values, blocks that span rows, and last blocks that are not full.
SHAPES = {"nf4": (7, 15), "fp4": (3, 43), "nf4-nested": (9, 19), "int8": (5, 7)}


def weight(kind: str) -> torch.Tensor:
    """The weight that is quantised, with one row of zeros."""
    shape = SHAPES[kind]
    result = torch.randn(shape, generator=torch.Generator().manual_seed(len(kind))) * torch.arange(shape[0])[:, None]
    return result / 8


def stored(kind: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Role -> tensor as the package saves it, and what it dequantises that to, in float32."""
    from bitsandbytes import functional

    original = weight(kind)
    if kind == "int8":
        values, factors, _ = functional.int8_vectorwise_quant(original.half())
        return {"weight": values, "scale": factors}, functional.int8_vectorwise_dequant(values, factors)
    table, _, nested = kind.partition("-")
    packed, state = functional.quantize_4bit(
        original, blocksize=64, quant_type=table, compress_statistics=bool(nested), quant_storage=torch.uint8
    )
    found = state.as_dict(packed=True)
    found["state"] = found.pop(f"quant_state.bitsandbytes__{table}")
    return {"weight": packed, **found}, functional.dequantize_4bit(packed, state)


def main(path: str) -> None:
    """Write the numbers."""
    content: dict[str, Any] = {}
    for kind in SHAPES:
        parts, result = stored(kind)
        tensors = {**parts, "result": result.float()}
        content[kind] = {
            name: {"dtype": str(t.dtype).removeprefix("torch."), "shape": list(t.shape), "values": t.flatten().tolist()}
            for name, t in tensors.items()
        }
    Path(path).write_text(json.dumps(content) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
