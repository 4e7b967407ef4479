"""The attention of PHOTON layers as vLLM sees it: caches with their specs, metadata of a step, and one operation."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.utils.torch_utils import direct_register_custom_op
from vllm.v1.attention.backend import AttentionBackend, AttentionMetadataBuilder, CommonAttentionMetadata
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheLayout, KVCacheSpec, SlidingWindowSpec

from photon_train.models.stores_photon import latent_parts

from .memory import RankMemory
from .specs import SinkWindowSpec
from .steps import Layout, Step, StepMetadata

# Tokens of a block of keys and values where the user names no --block-size: vLLM's default on a CPU, 128, fits its own
# kernel there and would keep up to 127 tokens that the window has left.
BLOCK_SIZE = 16
# Groups into which windowed layers are divided, about: vLLM divides them so that the blocks of a group are as large as
# those of the memory. Fewer groups cost less time in every step; larger blocks of the memory find fewer prefixes.
WINDOW_GROUPS = 8


class MetadataBuilder(AttentionMetadataBuilder[StepMetadata]):
    """Keeps of vLLM's metadata what the layers of a group need."""

    reorder_batch_threshold = 1

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> StepMetadata:
        given, count = common_attn_metadata, common_attn_metadata.num_reqs
        return StepMetadata(
            given.query_start_loc_cpu[: count + 1],
            given.seq_lens[:count],
            given.block_table_tensor[:count],
            given.slot_mapping[: given.num_actual_tokens],
        )


class PhotonBackend(AttentionBackend):
    """Paged windows, sinks and latents."""

    supported_dtypes = [torch.float32, torch.float16, torch.bfloat16]
    supported_kv_cache_dtypes = ["auto", "float16", "bfloat16"]

    @staticmethod
    def get_name() -> str:
        return "PHOTON"

    @staticmethod
    def get_impl_cls() -> type:
        raise NotImplementedError("PHOTON's layers have their attention in themselves")

    @staticmethod
    def get_builder_cls() -> type[MetadataBuilder]:
        return MetadataBuilder

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        # Blocks outermost: pages of windows and latents differ in size. Tokens before heads: a token is one piece.
        return (KVCacheLayout.BLNHC,)


class PagedCache(nn.Module, AttentionLayerBase):
    """A cache that vLLM allocates, under a name of its own.

    Args:
        layer_name: The name.
    """

    def __init__(self, layer_name: str) -> None:
        super().__init__()
        self.layer_name = layer_name
        self.kv_cache = torch.empty(0)
        context = get_current_vllm_config().compilation_config.static_forward_context
        if layer_name in context:
            raise ValueError(f"two caches are named {layer_name}")
        context[layer_name] = self

    def get_attn_backend(self) -> type[AttentionBackend]:
        return PhotonBackend

    @staticmethod
    def block_size(vllm_config: VllmConfig) -> int:
        """Tokens of a block of keys and values."""
        given = vllm_config.cache_config
        return given.block_size if given.user_specified_block_size else BLOCK_SIZE


class UnitsCache(PagedCache):
    """The latents of a memory layer, the same on every rank.

    Args:
        layer_name: Its name.
        layout: Of the model.
        layer: The layer.
    """

    def __init__(self, layer_name: str, layout: Layout, layer: int) -> None:
        super().__init__(layer_name)
        self.layout, self.layer = layout, layer
        layout.units[layer] = self

    def _unit_bytes(self, layer: int, dtype: torch.dtype) -> int:
        """Of one head."""
        return sum(part.nbytes(dtype.itemsize) for part in latent_parts(self.layout.config, 1))

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        config, dtype = self.layout.config, vllm_config.model_config.dtype
        of_cell = self._unit_bytes(self.layer, dtype)
        return FullAttentionSpec(
            block_size=self._block_tokens(vllm_config),
            num_kv_heads=len(config.memory_cells[self.layer]),
            head_size=config.head_dim,
            dtype=dtype if config.memory_bits == 16 else torch.uint8,
            state_content_bytes=of_cell,
            tokens_per_state=config.chunk_size,
            max_tp_shards=1,
        )

    def _block_tokens(self, vllm_config: VllmConfig) -> int:
        """Tokens of a block: a power of two times a window's block that fills `WINDOW_GROUPS`-th of the windows."""
        config, dtype = self.layout.config, vllm_config.model_config.dtype
        size = self.block_size(vllm_config)
        cells = sum(map(len, config.memory_cells.values()))
        per_token = cells * self._unit_bytes(self.layer, dtype) / config.chunk_size
        windowed = [cache for layer, cache in self.layout.layers.items() if self.layout.kind(layer)[0] == "window"]
        wanted = sum(cache.token_bytes(dtype) for cache in windowed) * size / WINDOW_GROUPS
        least = math.lcm(size, config.chunk_size)
        return least * 2 ** max(0, math.ceil(math.log2(wanted / (per_token * least))))


class PhotonAttention(PagedCache):
    """In place of vLLM's attention of a layer.

    Args:
        layer_name: Its name.
        layout: Of the model.
        layer: The layer.
        num_heads, num_kv_heads, head_dim, scale, softcap: Of this rank, from the attention that it replaces.
        memory: Of the layer, or None.
        sink_logits: Of this rank's query heads, ``[Hq]``, or None.
    """

    def __init__(
        self,
        layer_name: str,
        layout: Layout,
        layer: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        scale: float,
        softcap: float | None,
        memory: RankMemory | None,
        sink_logits: torch.Tensor | None = None,
    ) -> None:
        super().__init__(layer_name)
        self.layout, self.layer_idx, self.scale, self.softcap = layout, layer, scale, softcap
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        # Weights go by the names that the family's attention gives them.
        self._weights = memory, sink_logits
        layout.layers[layer] = self

    @property
    def memory(self) -> RankMemory | None:
        """Of the layer."""
        return self._weights[0]

    @property
    def sink_logits(self) -> torch.Tensor | None:
        """Of the layer's query heads."""
        return self._weights[1]

    def token_bytes(self, dtype: torch.dtype) -> int:
        """Of a token's key and value."""
        return 2 * self.num_kv_heads * self.head_dim * dtype.itemsize

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        config, (kind, window) = self.layout.config, self.layout.kind(self.layer_idx)
        shape = {
            "block_size": self.block_size(vllm_config),
            "num_kv_heads": self.num_kv_heads,
            "head_size": self.head_dim,
            "dtype": vllm_config.model_config.dtype,
        }
        if kind == "full":
            return FullAttentionSpec(**shape)
        if kind == "local":
            return SlidingWindowSpec(**shape, sliding_window=window, dcp_sharded=False)
        # A window reaches back to a multiple of the chunk, and the unit before it is packed when it is left.
        kept = window + (config.chunk_size if config.memory_cells else 0)
        return SinkWindowSpec(**shape, sliding_window=kept, num_sinks=config.num_sinks, dcp_sharded=False)

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **_: Any) -> torch.Tensor:
        """``[tokens, Hq D]`` of ``query [tokens, Hq D]``, ``key, value [tokens, Hkv D]``."""
        out = torch.empty_like(query).view(-1, self.num_heads, self.head_dim)
        states = (
            each.view(-1, heads, self.head_dim)
            for each, heads in ((query, self.num_heads), (key, self.num_kv_heads), (value, self.num_kv_heads))
        )
        torch.ops.vllm.photon_attention(*states, out, self.layer_name)
        return out.flatten(1)


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, out: torch.Tensor, layer_name: str) -> None:
    context = get_forward_context()
    module = context.no_compile_layers[layer_name]
    if context.attn_metadata is None:  # vLLM measures memory, or compiles
        out.zero_()
        return
    step = context.__dict__.get("photon_step")
    if step is None:
        ours = {
            cache.layer_name: context.attn_metadata[cache.layer_name]
            for cache in (*module.layout.layers.values(), *module.layout.units.values())
        }
        step = context.__dict__["photon_step"] = Step(module.layout, ours)
    step.attend(module, query, key, value, out)


def _attend_fake(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, out: torch.Tensor, layer_name: str
) -> None:
    return


direct_register_custom_op(op_name="photon_attention", op_func=_attend, mutates_args=["out"], fake_impl=_attend_fake)
# Where vLLM cuts a model's graph: what lies between runs compiled, or as CUDA graphs.
SPLITTING_OP = "vllm::photon_attention"
