"""What a dense model's layers attend to, as segments: for passes that restrict or record it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch

from photon_train.accounting.shape import Shape
from photon_train.models.attention_photon import NewElements, Segment
from photon_train.models.segments_photon import FullSegment, WindowSegment


class GatedSegment:
    """Two segments mixed by key-value head: ``gate * far + (1 - gate) * near``.

    Args:
        far: What an open gate attends to.
        near: What a closed gate attends to.
        gates: One per key-value head, ``[Hkv]``; they may ask for gradients, and the mix is computed in their type.
    """

    def __init__(self, far: Segment, near: Segment, gates: torch.Tensor) -> None:
        self.far, self.near, self.gates = far, near, gates

    def attend(self, module, query, key, value, scale, softcap=None, sink_logits=None):
        far, near = (
            segment.attend(module, query, key, value, scale, softcap, sink_logits).to(self.gates.dtype)
            for segment in (self.far, self.near)
        )
        gates = self.gates.to(query.device).repeat_interleave(query.shape[1] // key.shape[1])
        return near.lerp(far, gates[:, None, None]).to(query.dtype)


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

    def restricted(
        self,
        config: Any,
        window: int,
        num_sinks: int,
        layers: Collection[int],
        gates: Mapping[int, torch.Tensor] | None = None,
    ) -> list[Segment]:
        """The same with `layers` restricted to a window and sinks, but for what `gates` let through.

        Args:
            gates: By layer, how much of the layer's own attention each key-value head keeps, ``[Hkv]``.
        """
        near, gates = self.window(window, num_sinks), gates or {}

        def segment(layer: int, own: Segment) -> Segment:
            if layer not in layers:
                return own
            return GatedSegment(own, near, gates[layer]) if layer in gates else near

        return [segment(layer, own) for layer, own in enumerate(self.dense(config))]
