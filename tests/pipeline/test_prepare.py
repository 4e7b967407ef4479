"""What the plan says on the screen before a run begins."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_dense import save_dense

from photon_train.config import RunConfig
from photon_train.conversion.source import DenseCheckpoint
from photon_train.pipeline.prepare import plan_conversion, show_conversion


def shown(directory, capsys, dtype: str = "auto") -> str:
    config = RunConfig(model=str(directory))
    config.export.dtype = dtype
    show_conversion(plan_conversion(DenseCheckpoint.open(str(directory)), config, num_processes=1))
    return " ".join(capsys.readouterr().out.split())


def store(directory, dtypes: dict[str, torch.dtype]) -> None:
    """Store the tensors that `dtypes` names in these types."""
    path = directory / "model.safetensors"
    weights = {name: tensor.to(dtypes.get(name, tensor.dtype)) for name, tensor in load_file(path).items()}
    save_file(weights, path, metadata={"format": "pt"})


@pytest.mark.parametrize(("dtype", "written"), [("auto", "bfloat16"), ("float16", "float16")])
def test_a_checkpoint_of_several_types_is_cast_aloud(dtype, written, tmp_path, capsys):
    """The embedding's type stands for all, which costs the others digits."""
    dense = save_dense(tmp_path)
    assert "several types" not in shown(dense, capsys)
    store(dense, {"model.embed_tokens.weight": torch.bfloat16})
    text = shown(dense, capsys, dtype)
    others = len(load_file(dense / "model.safetensors")) - 1
    assert f"stored in several types, with {others} tensors in float32" in text
    assert f"all is written in {written}, or in what export.dtype says" in text


def test_a_norm_in_another_type_is_told_too(tmp_path, capsys):
    dense = save_dense(tmp_path)
    store(dense, {"model.norm.weight": torch.float64})
    assert "with 1 tensor in float64: all is written in float32" in shown(dense, capsys)
