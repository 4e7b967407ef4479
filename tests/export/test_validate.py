"""`validate_export` finds what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import photon_model

from photon_train.config import ExportSettings
from photon_train.errors import PhotonError
from photon_train.export.save import export_model
from photon_train.export.validate import validate_export
from photon_train.manifest import write_manifest


@pytest.fixture
def directory(tmp_path: Path, tokenizer) -> Path:
    settings = ExportSettings()
    return export_model(photon_model("memory"), tokenizer, tmp_path / "export", settings=settings, card="")


def rewrite(directory: Path, change) -> None:
    """Change the weights and the manifest with them."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    write_manifest(directory, "export", {}, {})


def test_a_changed_file(directory: Path) -> None:
    with open(directory / "modeling_photon.py", "a") as file:
        file.write("\n")
    with pytest.raises(PhotonError, match="modeling_photon.py"):
        validate_export(directory)


def test_a_missing_file(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    with pytest.raises(PhotonError, match="model.safetensors is missing"):
        validate_export(directory)


def test_missing_weights(directory: Path) -> None:
    rewrite(directory, lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(PhotonError, match="missing_keys"):
        validate_export(directory)


def test_weights_that_are_not_finite(directory: Path) -> None:
    rewrite(directory, lambda tensors: tensors["model.norm.weight"].fill_(torch.nan))
    with pytest.raises(PhotonError, match="logits are not finite"):
        validate_export(directory)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.2.self_attn.memory.converter.maps.0.bias",
        "model.layers.0.self_attn.memory.chunker.maps.0.weight",
    ],
)
def test_another_function(directory: Path, name: str) -> None:
    """The sequences must reach every path: here those that only far tokens take."""
    reference = photon_model("memory")
    assert validate_export(directory, reference).max_logit_difference <= 1e-6
    with torch.no_grad():
        reference.get_parameter(name).mul_(1.5)
    with pytest.raises(PhotonError, match="differ from the trained model's"):
        validate_export(directory, reference)


def test_without_a_reference(directory: Path) -> None:
    check = validate_export(directory)
    assert check.max_logit_difference is None and check.kl is None
    assert check.to_dict()["parameters"] == check.parameters == photon_model("memory").num_parameters()


def test_the_reference_stays_in_its_mode(directory: Path) -> None:
    reference = photon_model("memory").train()
    validate_export(directory, reference)
    assert reference.training
