"""What vLLM has to keep of a request: the window's and the sinks' blocks, and of the memory all blocks.

A window that slides frees what it leaves. The first tokens (attention sinks, arXiv 2309.17453) stay: vLLM's own
``sinks`` are something else, learned logits. The manager here keeps their blocks wherever vLLM's manager of sliding
windows drops, skips or looks for blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm.utils.math_utils import cdiv
from vllm.v1.core.kv_cache_utils import KVCacheBlock, resolve_block_hashes
from vllm.v1.core.single_type_kv_cache_manager import SlidingWindowManager
from vllm.v1.kv_cache_interface import SlidingWindowSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry


@dataclass(frozen=True, kw_only=True)
class SinkWindowSpec(SlidingWindowSpec):
    """A sliding window whose first `num_sinks` tokens stay."""

    num_sinks: int = 0

    @property
    def sink_blocks(self) -> int:
        """Blocks that hold sinks."""
        return cdiv(self.num_sinks, self.block_size)

    def max_admission_blocks_per_request(self, max_in_flight_tokens: int, max_model_len: int) -> int:
        inside = super().max_admission_blocks_per_request(max_in_flight_tokens, max_model_len)
        return min(inside + self.sink_blocks, cdiv(max_model_len, self.block_size) + 1)


class SinkWindowManager(SlidingWindowManager):
    """Never frees the blocks of a request's sinks, and takes a prefix for cached only with them."""

    def _remove_blocks_in_range(self, request_id: str, start: int, end: int, *args: Any, **kwargs: Any):
        start = max(start, self.kv_cache_spec.sink_blocks)
        return super()._remove_blocks_in_range(request_id, start, end, *args, **kwargs)

    def _cached_sinks(self, blocks: Sequence[KVCacheBlock], num_tokens: int) -> list[KVCacheBlock]:
        """Of a prefix's cached blocks those of sinks that lie left of the window, which the base class leaves out."""
        left = self.get_num_skipped_tokens(num_tokens) // self.block_size
        return [block for block in blocks[: min(self.kv_cache_spec.sink_blocks, left)] if not block.is_null]

    def add_local_computed_blocks(
        self,
        request_id: str,
        new_computed_blocks: Sequence[KVCacheBlock],
        num_local_computed_tokens: int,
        num_external_computed_tokens: int,
    ) -> None:
        super().add_local_computed_blocks(
            request_id, new_computed_blocks, num_local_computed_tokens, num_external_computed_tokens
        )
        sinks = self._cached_sinks(new_computed_blocks, num_local_computed_tokens + num_external_computed_tokens)
        if sinks:
            self.block_pool.touch(sinks)
            self.req_to_blocks[request_id][: len(sinks)] = sinks

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        *args: Any,
        **kwargs: Any,
    ) -> int:
        number = super().get_num_blocks_to_allocate(
            request_id, num_tokens, new_computed_blocks, total_computed_tokens, *args, **kwargs
        )
        if request_id in self.num_cached_block:  # it runs already, with its sinks
            return number
        # Blocks that nobody uses count as free until they are touched.
        return number + self._get_num_evictable_blocks(self._cached_sinks(new_computed_blocks, total_computed_tokens))

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: Any,
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool: Any,
        kv_cache_spec: SinkWindowSpec,
        drop_eagle_block: bool,
        alignment_tokens: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        blocks, length = super().find_longest_cache_hit(
            block_hashes,
            max_length,
            kv_cache_group_ids,
            block_pool,
            kv_cache_spec,
            drop_eagle_block,
            alignment_tokens,
            *args,
            **kwargs,
        )
        hashes = resolve_block_hashes(
            block_hashes,
            block_pool.hash_block_size,
            kv_cache_spec.block_size,
            supports_fine_grained_hash_lookup=cls.supports_fine_grained_hash_lookup,
            alignment_tokens=alignment_tokens,
        )
        for index in range(min(kv_cache_spec.sink_blocks, len(blocks[0]))):
            cached = block_pool.get_cached_block(hashes[index], kv_cache_group_ids)
            if not cached:
                return tuple([] for _ in kv_cache_group_ids), 0
            for found, block in zip(blocks, cached, strict=True):
                found[index] = block
        return blocks, length

    @classmethod
    def reachable_block_mask(
        cls,
        start_block: int,
        end_block: int,
        alignment_tokens: int | None,
        kv_cache_spec: SinkWindowSpec,
        *args: Any,
        **kwargs: Any,
    ) -> list[bool] | None:
        # A hit needs the sinks too, beside the window before an aligned boundary.
        mask = super().reachable_block_mask(start_block, end_block, alignment_tokens, kv_cache_spec, *args, **kwargs)
        if mask is not None:
            for block in range(start_block, min(end_block, kv_cache_spec.sink_blocks)):
                mask[block - start_block] = True
        return mask


def register() -> None:
    """Tell vLLM which manager keeps the blocks of a `SinkWindowSpec`; more than once is once."""
    # vLLM registers its own kinds only while the registry is empty.
    KVCacheSpecRegistry._ensure_registered()
    KVCacheSpecRegistry.register(
        SinkWindowSpec, manager_class=SinkWindowManager, uniform_type_base_spec=SlidingWindowSpec
    )
