"""Hybrids: to vLLM they are models of another class, which says how large a state its recurrent layers keep."""

from __future__ import annotations

from typing import Any

from vllm import ModelRegistry
from vllm.transformers_utils.model_arch_config_convertor import (
    MODEL_ARCH_CONFIG_CONVERTORS,
    ModelArchConfigConvertorBase,
)

from photon_train.models.configuration_photon import PhotonConfig

# By family, the class that `photon_vllm.lfm2` and the like have for it.
ARCHITECTURES = {"lfm2": "PhotonLfm2ForCausalLM"}


class _Convertor(ModelArchConfigConvertorBase):
    """Names the class before vLLM looks for it: an export of any family says ``PhotonForCausalLM``."""

    def __init__(self, hf_config: PhotonConfig, *args: Any, **kwargs: Any) -> None:
        if hf_config.base_model_type in ARCHITECTURES:
            hf_config.architectures = [ARCHITECTURES[hf_config.base_model_type]]
        super().__init__(hf_config, *args, **kwargs)


def register() -> None:
    """Tell vLLM of hybrids; more than once is once."""
    MODEL_ARCH_CONFIG_CONVERTORS[PhotonConfig.model_type] = _Convertor
    for family, name in ARCHITECTURES.items():
        ModelRegistry.register_model(name, f"photon_vllm.{family}:{name}")
