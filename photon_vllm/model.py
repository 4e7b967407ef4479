"""`PhotonForCausalLM` on vLLM: the family's own model there, its attention replaced."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.registry import ModelRegistry
from vllm.platforms import current_platform

from photon_train.host_memory import keep_freed_memory
from photon_train.models.configuration_photon import PhotonConfig
from photon_train.models.families_photon import CLASS_PREFIXES, family
from photon_train.models.modeling_photon import rotation

from . import FAMILIES
from .attention import SPLITTING_OP, PhotonAttention, UnitsCache
from .memory import RankMemory
from .steps import Layout


class PhotonForCausalLM(LlamaForCausalLM):
    """Makes the model of the family that ``config.base_model_type`` names.

    To vLLM, which asks the class what it supports, it is a Llama: the families' models take the same part in LoRA,
    pipeline and tensor parallelism.
    """

    def __new__(cls, *, vllm_config: VllmConfig, prefix: str = "") -> nn.Module:
        config = vllm_config.model_config.hf_config
        if config.recurrent_layers:
            raise ValueError(
                f"exports of family {config.base_model_type} are hybrids, and this plugin has no pool of the states of "
                "recurrent layers: use generate()"
            )
        return _of_family(config.base_model_type)(vllm_config=vllm_config, prefix=prefix)


class _Grafted:
    """What is put before a family's class of vLLM."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        config = vllm_config.model_config.hf_config
        check(vllm_config)
        if current_platform.is_cpu():
            keep_freed_memory()
        compilation = vllm_config.compilation_config
        if compilation.splitting_ops is not None and SPLITTING_OP not in compilation.splitting_ops:
            compilation.splitting_ops.append(SPLITTING_OP)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        graft(self.model, config, vllm_config)


@functools.cache
def _of_family(model_type: str) -> type[nn.Module]:
    if model_type not in FAMILIES:
        raise ValueError(
            f"exports of family {model_type} are served by `photon-train serve`: this plugin was tested with families "
            f"{', '.join(FAMILIES)}"
        )
    theirs = ModelRegistry._try_load_model_cls(f"{CLASS_PREFIXES[model_type]}ForCausalLM")
    return type("PhotonForCausalLM", (_Grafted, theirs), {"__module__": __name__})


def check(vllm_config: VllmConfig) -> None:
    """Refuse what does not work with PHOTON's caches.

    Raises:
        ValueError: the message names the option.
    """
    parallel, cache = vllm_config.parallel_config, vllm_config.cache_config
    refused = {
        "--decode-context-parallel-size": parallel.decode_context_parallel_size > 1,
        "--prefill-context-parallel-size": getattr(parallel, "prefill_context_parallel_size", 1) > 1,
        "--kv-transfer-config": vllm_config.kv_transfer_config is not None,
        "--kv-cache-dtype": cache.cache_dtype not in ("auto", "float16", "bfloat16"),
        "--disable-hybrid-kv-cache-manager": bool(vllm_config.scheduler_config.disable_hybrid_kv_cache_manager),
    }
    if names := [name for name, is_set in refused.items() if is_set]:
        raise ValueError(f"{', '.join(names)}: not supported for a PHOTON model, leave it out")
    bound = getattr(vllm_config.model_config.hf_config, "clip_qkv", None)
    if bound is not None:
        raise ValueError(
            f"vLLM's model of this family does not clip queries, keys and values (clip_qkv={bound} in config.json): "
            "serve the export with `photon-train serve`"
        )
    speculative = vllm_config.speculative_config
    if speculative is not None and speculative.method != "ngram":
        raise ValueError(
            f"speculative method {speculative.method!r} is not supported for a PHOTON model: use 'ngram', or none"
        )


def graft(model: nn.Module, config: PhotonConfig, vllm_config: VllmConfig) -> None:
    """Replace the attention of a family's decoder stack, whose layers are ``model.layers``."""
    rotary = family(config.base_model_type).rotary(config=config)
    device = vllm_config.device_config.device

    def rotated(positions: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        return rotation(config, rotary.to(positions.device), positions, layer)

    layout = Layout(config, rotated)
    context = vllm_config.compilation_config.static_forward_context
    for layer, attention in _attentions(model):
        dense = attention.attn
        del context[dense.layer_name]
        memory = None
        if layer in config.memory_cells:
            memory = attention.memory = RankMemory(config, layer).to(device)
            UnitsCache(f"{dense.layer_name}.units", layout, layer)
        attention.attn = PhotonAttention(
            dense.layer_name,
            layout,
            layer,
            dense.num_heads,
            dense.num_kv_heads,
            dense.head_size,
            dense.impl.scale,
            getattr(dense.impl, "logits_soft_cap", None) or None,
            memory,
        )


def _attentions(model: nn.Module) -> Iterator[tuple[int, nn.Module]]:
    """The layers of this rank of a pipeline, by their number, and their attention."""
    for layer in range(model.start_layer, model.end_layer):
        yield layer, model.layers[layer].self_attn
