"""The PHOTON models: this folder is what an export ships for ``trust_remote_code``."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .cache_hierarchical import HierarchicalCache
from .cache_photon import PhotonCache
from .configuration_hierarchical import HierarchicalConfig
from .configuration_photon import PhotonConfig, photon_config_class
from .families_photon import CLASS_PREFIXES
from .modeling_hierarchical import HierarchicalForCausalLM, HierarchicalModel
from .modeling_photon import PhotonForCausalLM, PhotonModel

# A graft's configuration has a class of its family's.
_CONFIGS = {PhotonConfig: [photon_config_class(name) for name in CLASS_PREFIXES], HierarchicalConfig: []}
for _config, _model, _causal_lm in (
    (PhotonConfig, PhotonModel, PhotonForCausalLM),
    (HierarchicalConfig, HierarchicalModel, HierarchicalForCausalLM),
):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    for _class in (_config, *_CONFIGS[_config]):
        AutoModel.register(_class, _model, exist_ok=True)
        AutoModelForCausalLM.register(_class, _causal_lm, exist_ok=True)
    _config.register_for_auto_class()
    _model.register_for_auto_class("AutoModel")
    _causal_lm.register_for_auto_class("AutoModelForCausalLM")

__all__ = [
    "HierarchicalCache",
    "HierarchicalConfig",
    "HierarchicalForCausalLM",
    "HierarchicalModel",
    "PhotonCache",
    "PhotonConfig",
    "PhotonForCausalLM",
    "PhotonModel",
]
