"""The PHOTON models: this folder is what an export ships for ``trust_remote_code``."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .cache_photon import PhotonCache
from .configuration_photon import PhotonConfig, family_config_class
from .families_photon import CLASS_PREFIXES
from .modeling_photon import PhotonForCausalLM, PhotonModel

AutoConfig.register("photon", PhotonConfig, exist_ok=True)
for _config in (PhotonConfig, *map(family_config_class, CLASS_PREFIXES)):  # they are looked up by an instance's class
    AutoModel.register(_config, PhotonModel, exist_ok=True)
    AutoModelForCausalLM.register(_config, PhotonForCausalLM, exist_ok=True)
PhotonConfig.register_for_auto_class()
PhotonModel.register_for_auto_class("AutoModel")
PhotonForCausalLM.register_for_auto_class("AutoModelForCausalLM")

__all__ = ["PhotonCache", "PhotonConfig", "PhotonForCausalLM", "PhotonModel"]
