"""What is missing, damaged, contradictory or of a method that is not read is one line, and leaves nothing behind."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_quantised import save_quantised

from photon_train.conversion.source import DenseCheckpoint
from photon_train.errors import PhotonError
from photon_train.manifest import write_manifest

LAYER = "model.layers.1.mlp.up_proj."
STATE = LAYER + "weight.quant_state.bitsandbytes__nf4"


def refuses(directory: Path, *words: str, headers: bool = True) -> None:
    """Opening is one error, which a dry run gives too where headers tell it."""
    for weights in (True, False) if headers else (True,):
        with pytest.raises(PhotonError) as error:
            DenseCheckpoint.open(str(directory), weights=weights)
        assert "\n" not in str(error.value)
        for word in words:
            assert word in str(error.value)
    cache = Path(os.environ["XDG_CACHE_HOME"], "photon-train", "dequantised")
    assert not cache.exists() or [path.name for path in cache.iterdir() if path.suffix != ".lock"] == []


def edit(directory: Path, **changes: torch.Tensor | None) -> Path:
    """Replace parts of one layer, by what follows its name with - for dots; None removes one."""
    path = directory / "model.safetensors"
    tensors = load_file(path)
    for ending, tensor in changes.items():
        name = LAYER + ending
        tensors.pop(name, None)
        if tensor is not None:
            tensors[name] = tensor.contiguous()
    save_file(tensors, path, metadata={"format": "pt"})
    return directory


def describe(directory: Path, **settings: object) -> Path:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": settings}))
    return directory


@pytest.mark.parametrize(
    ("kind", "part"),
    [
        ("fp8 blocks", "weight_scale_inv"),
        ("fp8 rows", "weight_scale"),
        ("compressed matrix", "weight_scale"),
        ("mxfp4", "weight_scales"),
        ("mxfp4", "weight_blocks"),
        ("bitsandbytes 4", "weight.absmax"),
        ("bitsandbytes 4", "weight.quant_map"),
        ("bitsandbytes 4", "weight.quant_state.bitsandbytes__nf4"),
        ("bitsandbytes 4 nested", "weight.nested_absmax"),
        ("bitsandbytes 4 nested", "weight.nested_quant_map"),
        ("bitsandbytes 8", "SCB"),
    ],
)
def test_a_part_that_is_missing(tmp_path, kind, part):
    directory = edit(save_quantised(tmp_path / "model", kind), **{part: None})
    refuses(directory, "model.safetensors: tensor", f"{LAYER}{part} is missing", "download")


@pytest.mark.parametrize(
    ("kind", "part", "value", "words"),
    [
        ("fp8 blocks", "weight_scale_inv", torch.ones(3, 3), ["has shape [3, 3]", "calls for [4, 2]"]),
        ("fp8 blocks", "weight_scale_inv", torch.ones(52, 1), ["has shape [52, 1]", "calls for [4, 2]"]),
        ("fp8 blocks", "weight_scale_inv", torch.ones(4, 2, dtype=torch.uint8), ["stored in uint8", "float8_e8m0fnu"]),
        ("fp8 blocks", "weight", torch.ones(52, 41).to(torch.float8_e4m3fn), ["has shape [52, 41]"]),
        ("fp8 blocks", "weight", torch.ones(52, 40), ["up_proj.weight_scale_inv belongs to no weight"]),
        ("fp8 rows", "weight_scale", torch.ones(40), ["has shape [40]", "[] or [1] or [52] or [52, 1]"]),
        ("fp8 rows", "weight", torch.ones(52, 40, dtype=torch.int8), ["up_proj.weight_scale belongs to no weight"]),
        ("compressed groups", "weight_scale", torch.ones(52, 1), ["calls for [52, 2]"]),
        ("mxfp4", "weight_scales", torch.ones(52, 2), ["stored in float32", "none of uint8"]),
        ("mxfp4", "weight_blocks", torch.ones(52, 1, 16, dtype=torch.uint8), ["calls for [52, 2, 16]"]),
        ("bitsandbytes 4", "weight", torch.ones(1000, 1, dtype=torch.uint8), ["another number of 4-bit values"]),
        ("bitsandbytes 4", "weight.quant_map", torch.ones(15), ["has shape [15]", "[16]"]),
        ("bitsandbytes 4", "weight.absmax", torch.ones(33).half(), ["stored in float16"]),
        ("bitsandbytes 4 nested", "weight.nested_quant_map", torch.ones(16), ["has shape [16]", "[256]"]),
        ("bitsandbytes 8", "SCB", torch.ones(40), ["has shape [40]", "[52]"]),
        ("bitsandbytes 8", "extra", torch.ones(3), ["up_proj.extra belongs to no weight"]),
    ],
)
def test_a_part_that_does_not_fit(tmp_path, kind, part, value, words):
    directory = edit(save_quantised(tmp_path / "model", kind), **{part: value})
    refuses(directory, "model.safetensors: tensor", LAYER, *words)


def test_a_weight_that_is_missing_altogether(tmp_path):
    directory = edit(save_quantised(tmp_path / "model", "mxfp4"), weight_blocks=None, weight_scales=None)
    refuses(directory, f"lacks tensor {LAYER}weight")


@pytest.mark.parametrize(
    ("kind", "part", "value", "words"),
    [
        ("fp8 rows", "weight", torch.full((52, 40), float("nan")).to(torch.float8_e4m3fn), ["NaN"]),
        ("fp8 rows", "weight_scale", torch.full((52, 1), float("inf")), ["NaN or infinite"]),
        ("mxfp4", "weight_scales", torch.full((52, 2), 255, dtype=torch.uint8), ["no numbers (255)"]),
        ("bitsandbytes 4", "weight.absmax", torch.ones(32), ["has 32 factors for 2080 values in blocks of 64"]),
        ("bitsandbytes 4 nested", "weight.nested_absmax", torch.ones(2), ["has 2 factors for 33 values"]),
        ("bitsandbytes 8", "weight_format", torch.ones((), dtype=torch.uint8), ["tiles", "weight_format"]),
    ],
)
def test_values_that_contradict_each_other(tmp_path, kind, part, value, words):
    """Known once they are read; what was written is gone then."""
    directory = edit(save_quantised(tmp_path / "model", kind), **{part: value})
    refuses(directory, "model.safetensors: tensor", f"{LAYER}weight", *words, headers=False)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "cannot be read"),
        ("[]", "cannot be read"),
        ('{"blocksize": 64}', "cannot be read"),
        ('{"blocksize": 0, "shape": [52, 40]}', "cannot be read"),
        ('{"blocksize": 64, "shape": [40, 52]}', "of shape [40, 52]"),
    ],
)
def test_a_state_that_is_damaged(tmp_path, text, words):
    state = torch.tensor(list(text.encode()), dtype=torch.uint8)
    directory = save_quantised(tmp_path / "model", "bitsandbytes 4")
    edit(directory, **{STATE.removeprefix(LAYER): state})
    refuses(directory, f"tensor {LAYER}weight has a quant_state", words, headers=False)


def test_weights_beyond_the_type_that_the_model_names(tmp_path):
    directory = edit(save_quantised(tmp_path / "model", "bitsandbytes 8"), SCB=torch.full((52,), 1e6))
    config = json.loads((directory / "config.json").read_text()) | {"dtype": "float16"}
    (directory / "config.json").write_text(json.dumps(config))
    words = ("model.safetensors: tensor", f"{LAYER}weight", "beyond float16", "write bfloat16")
    refuses(directory, *words, headers=False)


def test_factors_of_activations_are_no_weights(tmp_path):
    directory = save_quantised(tmp_path / "model", "fp8 matrix")
    edit(directory, input_scale=torch.ones(()), output_scale=torch.ones(1), kv_scale=torch.ones(1))
    assert set(DenseCheckpoint.open(str(directory)).tensors) == set(load_file(tmp_path / "copy" / "model.safetensors"))


def test_a_tile_format_of_zero_is_rows(tmp_path):
    directory = edit(
        save_quantised(tmp_path / "model", "bitsandbytes 8"), weight_format=torch.zeros((), dtype=torch.uint8)
    )
    copy = load_file(tmp_path / "copy" / "model.safetensors")
    assert torch.equal(DenseCheckpoint.open(str(directory)).load(LAYER + "weight"), copy[LAYER + "weight"])


GROUP = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True}


def _compressed(group: object = GROUP, **settings: object) -> dict[str, object]:
    groups = {"group_0": {"weights": group}}
    return {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": groups, **settings}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"quant_method": "gptq", "bits": 4}, ["quant_method 'gptq'", "unquantised weights, or a GGUF"]),
        ({"quant_method": "awq"}, ["quant_method 'awq'", "bitsandbytes, compressed-tensors, fbgemm_fp8, fp8, mxfp4"]),
        ({"quant_method": ["fp8"]}, ["quant_method \"['fp8']\""]),
        ({"bits": 4}, ["quant_method 'None'"]),
        ({"quant_method": "fp8", "weight_block_size": [128]}, ["weight_block_size is [128]", "[128, 128]"]),
        ({"quant_method": "fp8", "weight_block_size": [0, 128]}, ["weight_block_size is [0, 128]"]),
        ({"quant_method": "bitsandbytes"}, ["neither load_in_4bit nor load_in_8bit"]),
        (_compressed(format="pack-quantized"), ["format is pack-quantized", "float-quantized"]),
        (_compressed(config_groups={}), ["config_groups"]),
        (_compressed(None), ["config_groups.group_0.weights"]),
        (_compressed({**GROUP, "num_bits": 4}), ["config_groups.group_0.weights is 4 bits"]),
        (_compressed({**GROUP, "type": "int"}), ["8 bits, int"]),
        (_compressed({**GROUP, "symmetric": False}), ["config_groups.group_0.weights is 8 bits, float"]),
        (_compressed({**GROUP, "strategy": "tensor_group"}), ["strategy is tensor_group"]),
        (_compressed({**GROUP, "strategy": "block"}), ["block_structure is None"]),
        (_compressed({**GROUP, "strategy": "group"}), ["group_size is [1, None]"]),
        (_compressed(transform_config={"R1": {}}), ["transform_config"]),
        (_compressed(sparsity_config={"format": "sparse-24-bitmask"}), ["sparse-24-bitmask"]),
        (
            _compressed(
                config_groups={
                    "a": {"weights": GROUP},
                    "b": {"weights": {**GROUP, "strategy": "group", "group_size": 8}},
                }
            ),
            ["different ways"],
        ),
    ],
)
def test_methods_and_settings_that_are_not_read(tmp_path, settings, words):
    refuses(describe(save_quantised(tmp_path / "model", "fp8 matrix"), **settings), "config.json: quant", *words)


def test_a_changed_file_is_found_before_it_is_dequantised(tmp_path):
    directory = save_quantised(tmp_path / "model", "fp8 rows")
    write_manifest(directory, "dense", {}, {})
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    refuses(directory, "model.safetensors", "sha256", headers=False)


def test_a_damaged_note_says_what_to_delete(tmp_path):
    found = DenseCheckpoint.open(str(save_quantised(tmp_path / "model", "fp8 rows"))).directory
    (found / "dequantised.json").write_text("{}")
    with pytest.raises(PhotonError, match=r"dequantised\.json is damaged: delete .*model-"):
        DenseCheckpoint.open(str(found))


def test_a_full_disk_is_known_before(tmp_path, monkeypatch):
    from photon_train import files

    # What a run needs beside the weights is free, and a part of them.
    usage = type("Usage", (), {"free": files._SPARE_BYTES + 1000})
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: usage)
    refuses(save_quantised(tmp_path / "model", "fp8 rows"), "the dequantised model needs", headers=False)
