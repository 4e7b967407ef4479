"""What a model and its training cost, in closed form, before any weight is loaded."""

from photon_train.accounting.estimate import Estimate, estimate
from photon_train.accounting.fit import Fit, Option, find_fit, format_bytes
from photon_train.accounting.memory import TrainingMemory, TrainingSetup, activation_bytes, training_memory
from photon_train.accounting.model import (
    CacheBytes,
    cache_bytes,
    costs_of,
    growing_bytes_per_token,
    layer_positions,
    lora_parameters,
    new_parameters,
    photon_flops,
    photon_parameters,
    trainable_parameters,
)
from photon_train.accounting.shape import Shape, active_parameters, dense_cache_bytes, dense_flops, dense_parameters

__all__ = [
    "CacheBytes",
    "Estimate",
    "Fit",
    "Option",
    "Shape",
    "TrainingMemory",
    "TrainingSetup",
    "activation_bytes",
    "active_parameters",
    "cache_bytes",
    "costs_of",
    "dense_cache_bytes",
    "dense_flops",
    "dense_parameters",
    "estimate",
    "find_fit",
    "format_bytes",
    "growing_bytes_per_token",
    "layer_positions",
    "lora_parameters",
    "new_parameters",
    "photon_flops",
    "photon_parameters",
    "trainable_parameters",
    "training_memory",
]
