"""Runs the model on what the scheduler has chosen: prefill segments and decoding steps, to logits."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping

import torch
from transformers import PreTrainedModel

from photon_train.inference.blocks import Allocation
from photon_train.inference.cache import PagedCache
from photon_train.inference.graphs import StaticCalls

# Tokens that the segments of one pass follow and hold at most, where they are several: what attention takes beside the
# cache, masks and unpacked latents above all, grows with them.
PASS_TOKENS = 2**16
# The same of segments whose logits are all wanted, which are as many times the vocabulary.
SCORED_TOKENS = 2**10


class Runner:
    """The model and its cache.

    Args:
        model: In evaluation mode, on its device.
        cache: The sequences' cache.
        static: How the work of a decoding step is called at fixed shapes; None calls it as it is.
    """

    def __init__(self, model: PreTrainedModel, cache: PagedCache, static: StaticCalls | None = None) -> None:
        self.model, self.cache, self.static = model, cache, static

    @property
    def device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device

    @torch.no_grad()
    def prefill(
        self,
        work: list[tuple[Allocation, list[int]]],
        scored: Mapping[int, Callable[[torch.Tensor], None]] | None = None,
    ) -> torch.Tensor:
        """Feed each sequence its tokens; logits of what follows the last one, ``[n, V]``.

        Args:
            work: Sequences, and what each is fed.
            scored: Index into `work` -> who is given the logits of what follows each of its tokens, ``[tokens, V]``.
        """
        scored = scored or {}
        logits = torch.empty(len(work), self.model.config.vocab_size, device=self.device)
        for together in self._passes(work, scored):
            wanted = together[0] in scored
            found = self._segment([work[index] for index in together], wanted)
            logits[together] = found[:, -1].to(logits.dtype)
            if wanted:
                for index, row in zip(together, found, strict=True):
                    scored[index](row[len(row) - len(work[index][1]) :])
        return logits

    @staticmethod
    def _passes(work: list[tuple[Allocation, list[int]]], scored: Container[int] = ()) -> Iterator[list[int]]:
        """Which segments go together: of similar lengths, so that less than half of a pass is padding."""
        buckets: dict[tuple[bool, int], list[int]] = {}
        for index, (_, tokens) in enumerate(work):
            buckets.setdefault((index in scored, (len(tokens) - 1).bit_length()), []).append(index)
        for (wanted, _), bucket in buckets.items():
            longest = max(work[index][0].length + len(work[index][1]) for index in bucket)
            size = PASS_TOKENS // longest
            if wanted:
                size = min(size, SCORED_TOKENS // max(len(work[index][1]) for index in bucket))
            size = max(1, size)
            yield from (bucket[start : start + size] for start in range(0, len(bucket), size))

    def _segment(self, work: list[tuple[Allocation, list[int]]], wanted: bool) -> torch.Tensor:
        """Logits of what follows the last tokens, or if `wanted` all of them, ``[n, 1 or T, V]``."""
        width = max(len(tokens) for _, tokens in work)
        ids = torch.zeros(len(work), width, dtype=torch.long)
        mask = torch.zeros(len(work), width, dtype=torch.long)
        for index, (_, tokens) in enumerate(work):  # padded on the left: the last column is every row's last token
            ids[index, width - len(tokens) :] = torch.tensor(tokens)
            mask[index, width - len(tokens) :] = 1
        padded = bool((mask == 0).any())
        logits = self._forward([allocation for allocation, _ in work], ids, mask if padded else None, wanted)
        for allocation, tokens in work:
            allocation.length += len(tokens)
        return logits

    @torch.no_grad()
    def decode(self, work: list[tuple[Allocation, int]]) -> torch.Tensor:
        """Feed each sequence one token; logits of what follows it, ``[n, V]``."""
        order = sorted(range(len(work)), key=lambda index: work[index][0].row)
        allocations = [work[index][0] for index in order]
        ids = torch.tensor([[work[index][1]] for index in order])
        logits = self._forward(allocations, ids, None)[:, -1]
        for allocation in allocations:
            allocation.length += 1
        if order == sorted(order):
            return logits
        return torch.empty_like(logits).index_copy(0, torch.tensor(order, device=logits.device), logits)

    def _forward(
        self, allocations: list[Allocation], ids: torch.Tensor, mask: torch.Tensor | None, wanted: bool = False
    ) -> torch.Tensor:
        self.cache.begin(allocations)
        ids, mask = ids.to(self.device), None if mask is None else mask.to(self.device)
        state = self.cache.state
        if self.static is not None and ids.shape[1] == 1:
            return self.static.decode(self.model, state, ids)[:, None]
        keep = 0 if wanted else 1  # 0 keeps all
        return self.model(ids, attention_mask=mask, past_key_values=state, use_cache=True, logits_to_keep=keep).logits
