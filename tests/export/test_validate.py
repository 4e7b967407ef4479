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
from photon_train.export.validate import ExportCheck, validate_export
from photon_train.manifest import write_manifest
from photon_train.models import PhotonForCausalLM


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


def probed(reference, directory: Path, **settings) -> tuple[ExportCheck, torch.Tensor]:
    """The check, and the tokens that the reference was run on."""
    seen = []
    handle = reference.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    check = validate_export(directory, reference, **settings)
    handle.remove()
    return check, seen[0]["input_ids"]


def test_in_16_bits_the_difference_is_reported(tmp_path: Path, tokenizer) -> None:
    """As KL(reference || export) in nats per position; the export is far from its reference here."""
    reference, settings = photon_model("memory-many-sinks", seed=1), ExportSettings(dtype="bfloat16")
    directory = export_model(
        photon_model("memory-many-sinks"), tokenizer, tmp_path / "export", settings=settings, card=""
    )
    check, ids = probed(reference, directory)
    assert ids.shape[0] == 2 and ids.shape[1] > reference.config.window + 3 * reference.config.chunk_size
    with torch.no_grad():
        stored = PhotonForCausalLM.from_pretrained(directory, dtype="auto").eval()
        of_export, of_reference = (model(ids).logits.double().log_softmax(-1) for model in (stored, reference.eval()))
    expected = (of_reference.exp() * (of_reference - of_export)).sum(-1).mean().item()
    assert check.dtype == "bfloat16" and check.max_logit_difference > 0.1
    assert check.kl == pytest.approx(expected, rel=1e-4)


def test_large_logits_may_differ_in_proportion(tmp_path: Path, tokenizer) -> None:
    model, near, far = (photon_model("memory-many-sinks") for _ in range(3))
    with torch.no_grad():
        for one, factor in ((model, 1e4), (near, 1e4 * (1 + 5e-5)), (far, 1e4 * (1 + 5e-4))):
            one.lm_head.weight.mul_(factor)
    directory = export_model(model, tokenizer, tmp_path / "export", settings=ExportSettings(), card="")
    assert validate_export(directory, near).max_logit_difference > 2e-4
    with pytest.raises(PhotonError, match="differ from the trained model's"):
        validate_export(directory, far)


def test_without_a_reference(directory: Path) -> None:
    check = validate_export(directory)
    assert check.max_logit_difference is None and check.kl is None
    assert check.to_dict()["parameters"] == check.parameters == photon_model("memory").num_parameters()


def test_the_reference_stays_in_its_mode(directory: Path) -> None:
    reference, modes = photon_model("memory").train(), []
    reference.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    validate_export(directory, reference)
    assert reference.training and modes == [False]
