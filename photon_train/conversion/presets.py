"""From a preset's name to the kind of model that it makes, its configuration and the plan of its conversion."""

from __future__ import annotations

import torch
from transformers import PretrainedConfig

from photon_train.config import RunConfig
from photon_train.conversion.graft import GRAFT
from photon_train.conversion.hierarchical import HIERARCHICAL
from photon_train.conversion.plan import ConversionPlan, Dropped
from photon_train.conversion.source import DenseCheckpoint
from photon_train.conversion.target import Target
from photon_train.errors import PhotonError
from photon_train.models.experts_photon import stored_tensors

PRESETS: dict[str, Target] = {"graft": GRAFT, "split": HIERARCHICAL, "paper": HIERARCHICAL}
_BY_MODEL_TYPE = {target.model.config_class.model_type: target for target in PRESETS.values()}


def photon_config(dense: PretrainedConfig, settings: RunConfig) -> PretrainedConfig:
    """The configuration of what `settings.preset` makes of a dense model.

    Raises:
        PhotonError: naming the dotted key and the fix, for settings that the preset or the model cannot serve.
    """
    return PRESETS[settings.preset].configure(dense, settings)


def target_of(config: PretrainedConfig) -> Target:
    """The kind of a PHOTON configuration."""
    return _BY_MODEL_TYPE[config.model_type]


def target_tensors(config: PretrainedConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a checkpoint of `config` stores.

    A head that shares the embedding's weight is not stored.
    """
    with torch.device("meta"):
        model = target_of(config).model(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        shapes.pop("lm_head.weight", None)
    return stored_tensors(getattr(config, "base_model_type", ""), shapes)


def resolve_dtype(checkpoint: DenseCheckpoint, dtype: str) -> torch.dtype:
    """The type to write: `dtype`, or the checkpoint's for ``auto``.

    Raises:
        PhotonError: if the checkpoint's is float64, which is read but not written.
    """
    if dtype == "auto" and checkpoint.dtype == torch.float64:
        raise PhotonError(
            f"{checkpoint.directory} is stored in float64, which is not exported: set export.dtype=float32"
        )
    return checkpoint.dtype if dtype == "auto" else getattr(torch, dtype)


def make_plan(checkpoint: DenseCheckpoint, config: PretrainedConfig, dtype: str = "auto") -> ConversionPlan:
    """Plan the conversion of a checkpoint, and check the plan.

    Args:
        checkpoint: The dense model.
        config: The target, from `photon_config`.
        dtype: Type of the weights: ``auto`` is the checkpoint's.

    Raises:
        PhotonError: if the plan does not fit the checkpoint or the model, the checkpoint holds a tensor that is no
            part of one, or the type is not written.
    """
    target, targets = target_of(config), target_tensors(config)
    tensors = tuple(target.plan(name, shape, checkpoint.config, config) for name, shape in targets.items())
    used = {source for entry in tensors for source in entry.sources}
    dropped = tuple(Dropped(name, _drop_reason(name, config)) for name in checkpoint.tensors if name not in used)
    if unknown := [entry.source for entry in dropped if not entry.reason]:
        raise PhotonError(
            f"{checkpoint.directory}: {unknown[0]} ({len(unknown)} such tensors) is no part of a "
            f"{checkpoint.config.model_type} language model (a value or reward head?), and a PHOTON model has no place "
            "for it: save the causal LM without it, with `save_pretrained`, and convert that"
        )
    plan = ConversionPlan(
        preset=target.preset(config),
        family=checkpoint.config.model_type,
        dtype=str(resolve_dtype(checkpoint, dtype)).removeprefix("torch."),
        preserves_dense=target.preserves_dense,
        tensors=tensors,
        dropped=dropped,
    )
    plan.check(targets, {name: info.shape for name, info in checkpoint.tensors.items()})
    return plan


def _drop_reason(name: str, config: PretrainedConfig) -> str:
    """Why a dense tensor is not used; empty if there is no known reason."""
    if name == "lm_head.weight" and config.tie_word_embeddings:
        return "the head shares the embedding's weight"
    if name.endswith("rotary_emb.inv_freq"):
        return "computed from the configuration"
    return ""
