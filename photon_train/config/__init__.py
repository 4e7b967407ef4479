"""The settings of a run: `schema` declares them, `load` reads them, `yaml` writes them."""

from photon_train.config.load import load_config
from photon_train.config.schema import (
    PRESETS,
    WANDB_MODES,
    ConsistencySettings,
    DataSettings,
    DistillSettings,
    ExportSettings,
    HubSettings,
    LevelOverrides,
    LoraSettings,
    PhotonSettings,
    RunConfig,
    SourceSettings,
    TrackingSettings,
    TrainSettings,
)
from photon_train.config.yaml import read_yaml, to_dict, to_yaml

__all__ = [
    "PRESETS",
    "WANDB_MODES",
    "ConsistencySettings",
    "DataSettings",
    "DistillSettings",
    "ExportSettings",
    "HubSettings",
    "LevelOverrides",
    "LoraSettings",
    "PhotonSettings",
    "RunConfig",
    "SourceSettings",
    "TrackingSettings",
    "TrainSettings",
    "load_config",
    "read_yaml",
    "to_dict",
    "to_yaml",
]
