"""LFM2 on vLLM, which keeps the states of its short convolutions beside the blocks of attention."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from vllm.config import VllmConfig
from vllm.model_executor.layers.mamba.short_conv import ShortConv
from vllm.model_executor.models.lfm2 import Lfm2ForCausalLM
from vllm.platforms import current_platform
from vllm.v1.kv_cache_interface import KVCacheSpec

from .model import Grafted


def _unpadded(state: ShortConv, vllm_config: VllmConfig) -> KVCacheSpec:
    # vLLM pads a state to a block of full attention, which no layer here has, and all blocks would be as large.
    return replace(ShortConv.get_kv_cache_spec(state, vllm_config), page_size_padded=None)


class PhotonLfm2ForCausalLM(Grafted, Lfm2ForCausalLM):
    """A graft of LFM2."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", **kwargs: Any) -> None:
        config = vllm_config.model_config.hf_config
        # Published configurations have them beside the one that transformers reads.
        config.conv_dim = config.block_dim = config.hidden_size
        super().__init__(vllm_config=vllm_config, prefix=prefix, **kwargs)
        for module in self.modules():
            if isinstance(module, ShortConv):
                module.get_kv_cache_spec = partial(_unpadded, module)
            if hasattr(module, "cos_sin_cache") and current_platform.is_cpu():
                # vLLM's kernel for CPUs rotates the first head alone where heads are apart, as its LFM2 has them.
                module._forward_method = module.forward_native
