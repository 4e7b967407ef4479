"""What a dense model's layers attend to, as segments: for passes that restrict or record it."""

from __future__ import annotations

from typing import Any

import torch

from photon_train.accounting.shape import Shape
from photon_train.models.attention_photon import NewElements, Segment
from photon_train.models.segments_photon import FullSegment, WindowSegment


class DenseAttention:
    """Segments for whole sequences ``[B, T]`` without padding.

    Args:
        tokens: The batch, ``[B, T]``.
    """

    def __init__(self, tokens: torch.Tensor) -> None:
        self.index = torch.arange(tokens.shape[1], device=tokens.device)[None]
        self.new = NewElements(len(tokens), self.index, base=0)

    def full(self) -> Segment:
        """Everything before."""
        return FullSegment(self.new)

    def window(self, window: int, num_sinks: int = 0) -> Segment:
        """The last `window` tokens, the query's own included, and the first `num_sinks`."""
        return WindowSegment(self.new, self.index - window + 1, window - 1, num_sinks=num_sinks)

    def dense(self, config: Any) -> list[Segment]:
        """What each layer of a dense model of `config` (or the graft on it) attends to."""
        kinds = {own: self.full() if own is None else self.window(own) for own in set(Shape.of(config).windows)}
        return [kinds[own] for own in Shape.of(config).windows]
