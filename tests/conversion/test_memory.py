"""A checkpoint larger than the memory that is allowed for its conversion."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_dense import dense_config

from photon_train.conversion.families import dense_tensors
from photon_train.conversion.source import INDEX

CONVERT = """
import resource, sys
from pathlib import Path
from photon_train.config import RunConfig
from photon_train.conversion.apply import convert
from photon_train.conversion.presets import make_plan, photon_config
from photon_train.conversion.source import DenseCheckpoint

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

import photon_train.models
before = peak()
settings = RunConfig()
checkpoint = DenseCheckpoint.open(sys.argv[1])
config = photon_config(checkpoint.config, settings)
plan = make_plan(checkpoint, config)
convert(checkpoint, plan, config, Path(sys.argv[2]), max_shard_size="500MB", progress=False)
print(plan.num_bytes, peak() - before)
"""

DEQUANTISE = """
import resource, sys
from photon_train.conversion.source import DenseCheckpoint

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

before = peak()
print(DenseCheckpoint.open(sys.argv[1]).quantised.bytes_after, peak() - before)
"""


def write_zeros(path: Path, tensors: dict[str, tuple[int, ...]], float8: tuple[str, ...] = ()) -> None:
    """A shard of float16 zeros, those named in `float8` in one byte each, that takes no room on disk."""
    header, offset = {}, 0
    for name, shape in tensors.items():
        dtype, size = ("F8_E4M3", 1) if name in float8 else ("F16", 2)
        end = offset + size * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    raw = json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw)
    os.truncate(path, 8 + len(raw) + offset)


@pytest.mark.slow
def test_memory_does_not_depend_on_the_size_of_the_model(tmp_path):
    config = dense_config(
        hidden_size=4096,
        intermediate_size=16384,
        num_hidden_layers=4,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=1024,
    )
    dense = tmp_path / "dense"
    dense.mkdir()
    config.save_pretrained(dense)
    shards: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in dense_tensors(config).items():
        part = name.split(".")[2] if ".layers." in name else "x"
        shards.setdefault(f"model-{part}.safetensors", {})[name] = shape
    for file, tensors in shards.items():
        write_zeros(dense / file, tensors)
    weight_map = {name: file for file, tensors in shards.items() for name in tensors}
    (dense / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    total = sum(file.stat().st_size for file in dense.glob("*.safetensors"))
    assert total > 1.9e9
    try:
        result = subprocess.run(
            [sys.executable, "-c", CONVERT, str(dense), str(tmp_path / "photon")],
            capture_output=True,
            text=True,
            check=True,
        )
    finally:
        for file in tmp_path.rglob("*.safetensors"):
            file.unlink()
    written, grown = map(int, result.stdout.split()[-2:])
    assert written > total
    assert grown < 300e6, f"converting {written / 1e9:.1f} GB took {grown / 1e6:.0f} MB more than the imports"


@pytest.mark.slow
def test_quantised_weights_are_in_memory_one_at_a_time(tmp_path):
    config = dense_config(hidden_size=2048, intermediate_size=8192, num_hidden_layers=8, head_dim=512, vocab_size=1024)
    dense = tmp_path / "dense"
    dense.mkdir()
    weights = dense_tensors(config)
    quantised = tuple(name for name in weights if name.endswith("proj.weight"))
    scales = {f"{name}_scale": weights[name][:1] for name in quantised}
    write_zeros(dense / "model.safetensors", {**weights, **scales}, quantised)
    content = config.to_dict() | {"quantization_config": {"quant_method": "fp8"}}
    (dense / "config.json").write_text(json.dumps(content))
    environment = {**os.environ, "PHOTON_TRAIN_CACHE": str(tmp_path / "cache")}
    try:
        result = subprocess.run(
            [sys.executable, "-c", DEQUANTISE, str(dense)], capture_output=True, text=True, check=True, env=environment
        )
    finally:
        for file in tmp_path.rglob("*.safetensors"):
            file.unlink()
    written, grown = map(int, result.stdout.split())
    largest = 4 * 2048 * 8192
    assert written > 15 * largest
    assert grown < 4 * largest, f"dequantising {written / 1e9:.1f} GB took {grown / 1e6:.0f} MB"
