"""Runs the model on what the scheduler has chosen: prefill segments and decoding steps, to logits."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from photon_train.inference.cache import PagedCache
from photon_train.inference.graphs import StaticParts
from photon_train.inference.pages import Held
from photon_train.inference.prefill import SegmentPass
from photon_train.models import PhotonForCausalLM
from photon_train.models.decoding_photon import TokenStepper

# Tokens that the segments of one pass follow and hold at most, where they are several: what attention takes beside the
# cache, masks and unpacked latents above all, grows with them.
PASS_TOKENS = 2**16


class Runner:
    """The model and its cache.

    Prefill runs in torch; decoding on the model's backend (`PhotonForCausalLM.set_backend`).

    Args:
        model: In evaluation mode, on its device.
        cache: The sequences' cache.
        parts: How the parts of a decoding step are run, see `TokenStepper`; None calls them.
    """

    def __init__(self, model: PhotonForCausalLM, cache: PagedCache, parts: StaticParts | None = None) -> None:
        self.model, self.cache = model, cache
        self.stepper = TokenStepper(model.model, cache, model.backend, parts)

    @property
    def device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device

    @torch.no_grad()
    def prefill(self, work: list[tuple[Held, list[int]]]) -> torch.Tensor:
        """Feed each sequence its tokens; logits of what follows the last one, ``[n, V]``."""
        logits = torch.empty(len(work), self.model.config.vocab_size, device=self.device)
        for together in self._passes(work):
            logits[together] = self._segment([work[index] for index in together]).to(logits.dtype)
        return logits

    @staticmethod
    def _passes(work: list[tuple[Held, list[int]]]) -> Iterator[list[int]]:
        """Which segments go together: of similar lengths, so that less than half of a pass is padding."""
        buckets: dict[int, list[int]] = {}
        for index, (_, tokens) in enumerate(work):
            buckets.setdefault((len(tokens) - 1).bit_length(), []).append(index)
        for bucket in buckets.values():
            bucket.sort(key=lambda index: work[index][0].row)
            longest = max(work[index][0].length + len(work[index][1]) for index in bucket)
            size = max(1, PASS_TOKENS // longest)
            yield from (bucket[start : start + size] for start in range(0, len(bucket), size))

    def _segment(self, work: list[tuple[Held, list[int]]]) -> torch.Tensor:
        counts = [len(tokens) for _, tokens in work]
        ids = torch.zeros(len(work), max(counts), dtype=torch.long)
        for index, (_, tokens) in enumerate(work):
            ids[index, : len(tokens)] = torch.tensor(tokens)
        rows = torch.tensor([held.row for held, _ in work], device=self.device)
        self.cache.begin([held for held, _ in work])
        embeds = self.model.get_input_embeddings()(ids.to(self.device))
        hidden = SegmentPass(self.model.model, self.cache, rows).feed(embeds, torch.tensor(counts, device=self.device))
        for (held, _), count in zip(work, counts, strict=True):
            held.length += count
        return self._logits(hidden)

    @torch.no_grad()
    def decode(self, work: list[tuple[Held, int]]) -> torch.Tensor:
        """Feed each sequence one token; logits of what follows it, ``[n, V]``."""
        order = sorted(range(len(work)), key=lambda index: work[index][0].row)
        rows = torch.tensor([work[index][0].row for index in order], device=self.device)
        tokens = torch.tensor([work[index][1] for index in order], device=self.device)
        lengths = [work[index][0].length for index in order]
        self.cache.begin([held for held, _ in work])
        self.stepper.backend = self.model.backend
        hidden = self.stepper.feed(rows, self.model.get_input_embeddings()(tokens), lengths)
        for held, _ in work:
            held.length += 1
        logits = self.stepper.run(self._head, 0, rows, hidden)
        return torch.empty_like(logits).index_copy(0, torch.tensor(order, device=self.device), logits)

    def _head(self, level: int, rows: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        return self._logits(hidden)

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.model.lm_head(self.model.model.norm(hidden))
