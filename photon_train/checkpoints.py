"""The configuration of a PHOTON checkpoint on disk."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoConfig, PretrainedConfig

from photon_train.errors import PhotonError

# Kinds of PHOTON models.
MODEL_TYPES = ("photon", "photon_hierarchical")


def read_config(directory: str | Path) -> PretrainedConfig:
    """The configuration of a converted or exported model.

    Raises:
        PhotonError: in one line, if there is none, it is of another kind of model, of an older layout, or unsound.
    """
    import photon_train.models  # noqa: F401  registers PHOTON with the Auto classes

    directory = Path(directory)
    if not (directory / "config.json").is_file():
        raise PhotonError(f"{directory} holds no config.json: give the converted/ or export/ directory of a run")
    try:
        model_type = PretrainedConfig.get_config_dict(directory)[0].get("model_type")
        if model_type in MODEL_TYPES:
            return AutoConfig.from_pretrained(directory)
    except (ValueError, OSError) as error:
        raise PhotonError(f"{directory / 'config.json'}: {first_line(error)}") from error
    raise PhotonError(f"{directory} is no PHOTON model: convert it with `photon-train convert`")


def first_line(error: Exception) -> str:
    """What transformers says first; more lines are advice about its hub."""
    return str(error).strip().split("\n")[0]
