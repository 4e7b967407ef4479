"""Writing the served checkpoint: one directory that loads with and without photon-train."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from photon_train.config import ExportSettings
from photon_train.errors import PhotonError
from photon_train.files import atomic_directory, check_can_write, parse_size
from photon_train.manifest import write_manifest

STAGE = "export"


def export_model(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    output_dir: str | os.PathLike[str],
    *,
    settings: ExportSettings,
    card: str,
    generation_config: GenerationConfig | None = None,
    state_dict: dict[str, torch.Tensor] | None = None,
    run_config: Mapping[str, Any] | None = None,
    inputs: Mapping[str, Path] | None = None,
) -> Path:
    """Write safetensors, config, the model's code, tokenizer, generation config, model card and manifest.

    With several processes only the main one calls this, with the state dict that all of them gathered.

    Args:
        model: A PHOTON model without adapters. With `state_dict`, any module whose ``config`` is the model's
            (wrapped, sharded or with adapters): its weights are then not read.
        tokenizer: The dense model's tokenizer.
        output_dir: Directory to create; it appears when everything is written, and only then.
        settings: Shard size and the weights' type; ``auto`` is the one that the model's config states. A model that
            was loaded in another type than the checkpoint's (``dtype=``) states that one: name the type then.
        card: Text of README.md (`card.model_card`).
        generation_config: Default is the model's own.
        state_dict: All weights by the names of the model without adapters, these merged
            (`photon_train.training.collect.gather_full_model`). The dict is emptied tensor by tensor, so that a change
            of type needs no second copy of the model.
        run_config: The run's settings, for the manifest; default is `settings`.
        inputs: What the weights were made of, by role, for the manifest.

    Returns:
        `output_dir`.

    Raises:
        PhotonError: before anything is written, if `output_dir` is not empty, the disk is too full, a name or shape of
            the weights does not fit the config or a weight is not finite in the type; later if writing fails. Nothing
            is left behind.
    """
    output_dir = Path(output_dir)
    skeleton = _skeleton(model.config, settings.dtype)
    generation_config = generation_config or getattr(model, "generation_config", None) or skeleton.generation_config
    shard_bytes = parse_size(settings.max_shard_size)
    check_can_write(output_dir, num_bytes(skeleton), "the export")
    weights = _cast_weights(skeleton, dict(model.state_dict()) if state_dict is None else state_dict)
    try:
        with atomic_directory(output_dir) as directory:
            # Also writes config.json with its auto_map, and copies the code that it names.
            skeleton.save_pretrained(directory, state_dict=weights, max_shard_size=shard_bytes)
            # Unlike `save_pretrained` this does not refuse settings that other releases of transformers accepted.
            generation_config.to_json_file(directory / "generation_config.json")
            tokenizer.save_pretrained(directory)
            (directory / "README.md").write_text(card, encoding="utf-8")
            write_manifest(directory, STAGE, run_config or asdict(settings), inputs or {})
    except (OSError, SafetensorError) as error:
        raise PhotonError(f"{output_dir} cannot be written: {error}") from error
    return output_dir


def check_weights(model: PreTrainedModel, dtype: str) -> None:
    """Check before a training that its export could hold the model as it is now.

    Args:
        model: A PHOTON model without adapters; its weights are read once.
        dtype: As in `ExportSettings`.

    Raises:
        PhotonError: if a weight is not finite in that type.
    """
    target = _written_dtype(model.config, dtype)
    most = torch.finfo(target).max
    for name, parameter in model.named_parameters():
        low, high = torch.aminmax(parameter.detach())
        if not (-most <= low and high <= most):  # as well where both are NaN
            raise PhotonError(
                f"{model.name_or_path}: {name} is not finite in {target}: set export.dtype to a wider type, or start "
                "from sound weights"
            )


def num_bytes(model: PreTrainedModel) -> int:
    """Bytes of the weights on disk, in the model's type; a tied head counts once."""
    return sum(math.prod(parameter.shape) * parameter.element_size() for parameter in model.parameters())


def _skeleton(config: PretrainedConfig, dtype: str) -> PreTrainedModel:
    """The model without weights, in the type that is written."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config)).to(_written_dtype(config, dtype))
    # Saving adds the class itself, and the configuration's.
    model.config.auto_map = {"AutoModel": _code_reference(type(model.model))}
    return model


def _written_dtype(config: PretrainedConfig, dtype: str) -> torch.dtype:
    if dtype == "auto":
        dtype = str(config.dtype or "float32").removeprefix("torch.")
    return getattr(torch, dtype)


def _code_reference(model_class: type) -> str:
    return f"{model_class.__module__.rpartition('.')[2]}.{model_class.__name__}"


def _cast_weights(skeleton: PreTrainedModel, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights that are stored, on the CPU and in the skeleton's type; `state` is emptied."""
    expected = skeleton.state_dict()
    for tied in skeleton.all_tied_weights_keys:
        expected.pop(tied, None)
        state.pop(tied, None)
    if wrong := sorted(set(expected) ^ set(state)):
        raise PhotonError(
            f"export: the weights do not fit the model's config: {wrong[0]} is "
            f"{'missing' if wrong[0] in expected else 'unknown'} ({len(wrong)} such names); merge the adapters first"
        )
    weights = {}
    for name, target in expected.items():
        if state[name].shape != target.shape:
            raise PhotonError(
                f"export: {name} has shape {list(state[name].shape)} instead of {list(target.shape)}; with ZeRO-3, "
                "gather the weights first"
            )
        weights[name] = state.pop(name).detach().to("cpu", target.dtype)
        if not bool(weights[name].isfinite().all()):
            raise PhotonError(f"export: {name} is not finite in {target.dtype}: set export.dtype, or train again")
    return weights
