"""`PhotonForCausalLM` on vLLM: the family's own model there, its attention replaced."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.registry import ModelRegistry
from vllm.model_executor.models.transformers.base import Base as TransformersBase
from vllm.model_executor.models.utils import PPMissingLayer
from vllm.platforms import current_platform

from photon_train.host_memory import keep_freed_memory
from photon_train.models.configuration_photon import PhotonConfig
from photon_train.models.families_photon import CLASS_PREFIXES, family, has_sink_logits
from photon_train.models.modeling_photon import rotation

from . import FAMILIES, REFUSED, TAKEN_FOR_GRANTED
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
        return _of_family(config.base_model_type)(vllm_config=vllm_config, prefix=prefix)


class Grafted:
    """What is put before a family's class of vLLM."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        config = vllm_config.model_config.hf_config
        check(vllm_config)
        _say_as_vllm_reads(config)
        if current_platform.is_cpu():
            keep_freed_memory()
        compilation = vllm_config.compilation_config
        if compilation.splitting_ops is not None and SPLITTING_OP not in compilation.splitting_ops:
            compilation.splitting_ops.append(SPLITTING_OP)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        graft(self.model, config, vllm_config)


def _say_as_vllm_reads(config: PhotonConfig) -> None:
    """Put what transformers' configuration says of a family where vLLM's model of it looks."""
    rope = config.rope_parameters
    if config.base_model_type == "ministral3":
        config.llama_4_scaling = {
            "beta": rope["llama_4_scaling_beta"],
            "original_max_position_embeddings": rope["original_max_position_embeddings"],
        }
    if config.base_model_type == "gpt_oss":  # YaRN's defaults
        config.rope_parameters = {"beta_fast": 32.0, "beta_slow": 1.0, **rope}


class _OfTransformers:
    """Stands between: vLLM's own class for families that it runs as transformers has them, its linear maps in place.

    It makes the model that a configuration describes: that has to be the dense one.
    """

    def _patch_config(self) -> None:
        self.config = self.text_config = self.config.dense_config()
        super()._patch_config()


@functools.cache
def _of_family(model_type: str) -> type[nn.Module]:
    if model_type not in FAMILIES:
        raise ValueError(
            f"exports of family {model_type} are not served on vLLM: {REFUSED[model_type]}; use generate()"
        )
    theirs = ModelRegistry._try_load_model_cls(f"{CLASS_PREFIXES[model_type]}ForCausalLM")
    between = (_OfTransformers,) if issubclass(theirs, TransformersBase) else ()
    return type("PhotonForCausalLM", (Grafted, *between, theirs), {"__module__": __name__})


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
    config = vllm_config.model_config.hf_config
    said = config.to_dict()
    for key, only in TAKEN_FOR_GRANTED.get(config.base_model_type, {}).items():
        # Releases of transformers without a key have its only value.
        value = functools.reduce(lambda where, name: where.get(name, only), key.split("."), said)
        if value != only:
            raise ValueError(
                f"vLLM's model of family {config.base_model_type} does not read {key}={value} of config.json, only "
                f"{only}: serve the export with `photon-train serve`"
            )
    speculative = vllm_config.speculative_config
    if speculative is not None and config.recurrent_layers:
        raise ValueError(
            f"recurrent layers of family {config.base_model_type} take no drafts back: leave speculation out"
        )
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

    longest = vllm_config.model_config.max_model_len
    for module in model.modules():
        angles = getattr(module, "cos_sin_cache", None)
        if angles is not None and len(angles) < longest:
            raise ValueError(
                f"vLLM's model of family {config.base_model_type} rotates {len(angles)} positions, which follow from "
                f"rope_parameters in config.json, and --max-model-len is {longest}: lower it"
            )
    layout = Layout(config, rotated)
    context = vllm_config.compilation_config.static_forward_context
    for layer, attention in _attentions(model, config):
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
            attention.sinks if has_sink_logits(config) else None,
        )


def _attentions(model: nn.Module, config: PhotonConfig) -> Iterator[tuple[int, nn.Module]]:
    """The attention layers of this rank of a pipeline, by their number, and their attention."""
    recurrent = config.recurrent_layers
    for layer, block in enumerate(model.layers):
        if layer not in recurrent and not isinstance(block, PPMissingLayer):
            yield layer, block.self_attn if hasattr(block, "self_attn") else block.attn
