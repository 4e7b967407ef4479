"""Quantisers written from the formats' published definitions, value by value or block by block, for the tests.

Each takes a matrix and returns what a checkpoint stores for it, under the endings that are put after the layer's name,
and the matrix in float64 that the stored numbers stand for.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tiny_dense import save_dense

Quantised = tuple[dict[str, torch.Tensor], torch.Tensor]
SIZES = {"hidden_size": 40, "intermediate_size": 52}  # no whole number of any format's blocks
BLOCK = (16, 24)
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]
# Values between -1 and 1 that are not symmetric, as nf4's are not.
TABLE = [-1.0, -0.7, -0.53, -0.4, -0.28, -0.18, -0.09, 0.0, 0.08, 0.16, 0.25, 0.34, 0.44, 0.56, 0.72, 1.0]
SMALL_TABLE = torch.linspace(-1, 1, 256)


def nearest(values: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    return (values[:, None] - table).abs().argmin(1)


def fp8(weight: torch.Tensor, rows: int, columns: int, dtype: torch.dtype = torch.float8_e4m3fn) -> Quantised:
    """Blocks of `rows` x `columns`; the scale is a matrix with one factor for each."""
    stored = torch.empty(weight.shape, dtype=dtype)
    exact = torch.empty(weight.shape, dtype=torch.float64)
    tops, lefts = range(0, weight.shape[0], rows), range(0, weight.shape[1], columns)
    scale = torch.empty(len(tops), len(lefts))
    for (i, top), (j, left) in product(enumerate(tops), enumerate(lefts)):
        block = (slice(top, top + rows), slice(left, left + columns))
        scale[i, j] = weight[block].abs().max() / torch.finfo(dtype).max
        stored[block] = (weight[block] / scale[i, j]).to(dtype)
        exact[block] = stored[block].double() * scale[i, j].double()
    return {"weight": stored, "weight_scale": scale}, exact


def fp8_blocks(weight: torch.Tensor) -> Quantised:
    stored, exact = fp8(weight, *BLOCK)
    return {"weight": stored["weight"], "weight_scale_inv": stored["weight_scale"]}, exact


def fp8_rows(weight: torch.Tensor) -> Quantised:
    return fp8(weight, 1, weight.shape[1])


def fp8_matrix(weight: torch.Tensor) -> Quantised:
    stored, exact = fp8(weight, *weight.shape, dtype=torch.float8_e5m2)
    return {"weight": stored["weight"], "weight_scale": stored["weight_scale"].reshape(())}, exact


def fp8_groups(weight: torch.Tensor) -> Quantised:
    return fp8(weight, 1, 24)


def mxfp4(weight: torch.Tensor) -> Quantised:
    count = -(-weight.shape[1] // 32)
    blocks = torch.zeros(weight.shape[0], count, 16, dtype=torch.uint8)
    scales = torch.zeros(weight.shape[0], count, dtype=torch.uint8)
    exact = torch.empty(weight.shape, dtype=torch.float64)
    for row, block in product(range(weight.shape[0]), range(count)):
        values = weight[row, block * 32 : (block + 1) * 32].double()
        exponent = int(torch.frexp(values.abs().max()).exponent) - 3  # the largest value is below 8 times 2^exponent
        scales[row, block] = exponent + 127
        codes = nearest(values, torch.tensor(E2M1) * 2.0**exponent)
        exact[row, block * 32 : (block + 1) * 32] = torch.tensor(E2M1)[codes] * 2.0**exponent
        for column, code in enumerate(codes):
            blocks[row, block, column // 2] |= int(code) << (4 if column % 2 else 0)
    return {"weight_blocks": blocks, "weight_scales": scales}, exact


def bits4(weight: torch.Tensor, nested: bool = False, size: int = 64) -> Quantised:
    flat = weight.flatten().double()
    table = torch.tensor(TABLE)
    absmax = torch.stack([block.abs().max() for block in flat.split(size)]).float()
    state = {"quant_type": "nf4", "blocksize": size, "dtype": "bfloat16", "shape": list(weight.shape)}
    stored = {"weight.quant_map": table, "weight.absmax": absmax}
    if nested:
        offset = float(absmax.mean())
        nested_absmax = torch.stack([block.abs().max() for block in (absmax - offset).split(256)])
        whole = nested_absmax.repeat_interleave(256)[: len(absmax)]
        codes = nearest((absmax - offset) / whole, SMALL_TABLE)
        stored["weight.absmax"] = codes.to(torch.uint8)
        stored |= {"weight.nested_absmax": nested_absmax, "weight.nested_quant_map": SMALL_TABLE}
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
        absmax = SMALL_TABLE[codes].double() * whole + offset
    blocks = list(zip(flat.split(size), absmax.double(), strict=True))
    codes = torch.cat([nearest(block / factor, table) for block, factor in blocks]).tolist()
    exact = table.double()[codes] * torch.cat([factor.expand(len(block)) for block, factor in blocks])
    codes += [0] * (len(codes) % 2)
    packed = [high << 4 | low for high, low in zip(codes[::2], codes[1::2], strict=True)]
    stored["weight"] = torch.tensor(packed, dtype=torch.uint8)[:, None]
    stored["weight.quant_state.bitsandbytes__nf4"] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return stored, exact.view(weight.shape)


def bits4_nested(weight: torch.Tensor) -> Quantised:
    return bits4(weight, nested=True)


def bits8(weight: torch.Tensor) -> Quantised:
    largest = weight.abs().amax(1)
    stored = (weight / largest[:, None] * 127).round().to(torch.int8)
    return {"weight": stored, "SCB": largest}, stored.double() * largest.double()[:, None] / 127


def _compressed(**weights: object) -> dict[str, object]:
    group = {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float", "symmetric": True, **weights}}
    return {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": group}}


KINDS: dict[str, tuple[Callable[[torch.Tensor], Quantised], dict[str, object]]] = {
    "fp8 blocks": (fp8_blocks, {"quant_method": "fp8", "weight_block_size": list(BLOCK)}),
    "fp8 rows": (fp8_rows, {"quant_method": "fbgemm_fp8"}),
    "fp8 matrix": (fp8_matrix, {"quant_method": "fp8", "activation_scheme": "static"}),
    "compressed rows": (fp8_rows, _compressed(strategy="channel")),
    "compressed matrix": (fp8_matrix, _compressed(strategy="tensor")),
    "compressed groups": (fp8_groups, _compressed(strategy="group", group_size=24)),
    "mxfp4": (mxfp4, {"quant_method": "mxfp4"}),
    "bitsandbytes 4": (bits4, {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
    "bitsandbytes 4 nested": (bits4_nested, {"load_in_4bit": True}),
    "bitsandbytes 8": (bits8, {"quant_method": "bitsandbytes", "load_in_8bit": True}),
}


def save_quantised(directory: Path, kind: str, model_type: str = "llama", **changes: object) -> Path:
    """Write a tiny model whose linear layers are quantised; its dequantised copy, by float64, lies in ``copy`` beside.

    Returns:
        The directory.
    """
    copy = save_dense(directory.with_name("copy"), model_type, **{**SIZES, "num_hidden_layers": 2, **changes})
    return quantise_dense(copy, directory, kind)


def quantise_dense(copy: Path, directory: Path, kind: str) -> Path:
    """Write the dense model in `copy` to `directory`, its linear layers quantised; `copy` becomes what it stands for.

    Returns:
        `directory`.
    """
    quantise, settings = KINDS[kind]
    directory.mkdir()
    for path in copy.iterdir():
        if path.name != "model.safetensors":
            shutil.copyfile(path, directory / path.name)
    stored, exact = {}, {}
    for name, weight in load_file(copy / "model.safetensors").items():
        exact[name] = stored[name] = weight.bfloat16()
        if name.endswith("proj.weight"):
            parts, value = quantise(stored.pop(name).float())
            stored |= {name.removesuffix("weight") + ending: part.clone() for ending, part in parts.items()}
            exact[name] = value.float().bfloat16()
    save_file(exact, copy / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((copy / "config.json").read_text()) | {"dtype": "bfloat16"}
    (copy / "config.json").write_text(json.dumps(config))
    save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    return directory
