"""What a hierarchical model costs (presets ``split`` and ``paper``)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from photon_train.accounting.shape import Shape


class Hierarchical:
    """Closed formulas for a configuration with the attributes of `HierarchicalConfig`; attributes as in `Graft`."""

    scales_states, inputs = True, 2  # the hierarchy reads the embeddings too, padded to whole top units
    memory_states = (0, 0.0)

    def __init__(self, config: Any) -> None:
        self.config, self.dense, self.shape = config, config.base_config, Shape.of(config.base_config)
        self.unit = config.top_span
        levels, first = config.levels, config.levels[0]
        self.num_layers = sum(level["encoder_layers"] + level["decoder_layers"] for level in levels)
        self._stream = config.layout == "stream"
        # Levels (from 0) whose decoder reads isolated groups of R slots and C - 1 units.
        self._isolated: list[tuple[int, Mapping[str, Any]]] = [
            (index, level)
            for index, level in enumerate(levels)
            if level["decoder_layers"] and (index or not self._stream)
        ]
        positions = sum(level["encoder_layers"] / config.span(index + 1) for index, level in enumerate(levels))
        self.widest = max(1 / config.span(index + 1) for index in range(len(levels)))
        for index, level in self._isolated:
            group = (level["num_slots"] + level["chunk_size"] - 1) / config.span(index + 1)
            positions += level["decoder_layers"] * group
            self.widest = max(self.widest, group)
        # Slots are positions of the stream.
        self._stream_positions = 1 + first["num_slots"] / first["chunk_size"]
        if self._stream:
            positions += first["decoder_layers"] * self._stream_positions
            self.widest = max(self.widest, self._stream_positions)
        self.layer_positions = positions

    @property
    def new_parameters(self) -> int:
        """Parameters of chunkers, converters and their scales, input scales and the start state."""
        hidden, total = self.shape.hidden, self.shape.hidden
        for level in self.config.levels:
            total += (level["chunk_size"] + level["num_slots"]) * hidden**2 + 2 + int(level["decoder_layers"] > 0)
        return total

    @property
    def growing_per_token(self) -> float:
        """Elements that a token adds to the cache, on average."""
        unbounded = (
            level["encoder_layers"] / self.config.span(index + 1)
            for index, level in enumerate(self.config.levels)
            if level["encoder_window"] is None
        )
        return self.shape.kv * sum(unbounded)

    def _ring(self) -> int:
        """Elements of a layer of the token stream: sinks, window, and the slots of the window's chunks."""
        first = self.config.levels[0]
        slots = first["num_slots"] * math.ceil(self.config.window / first["chunk_size"])
        return self.config.num_sinks + self.config.window + slots

    def cache(self, tokens: int) -> tuple[int, int]:
        """Elements of the cache for one sequence of `tokens`: those that grow with the text, and the others.

        With S_l tokens under a level-l unit, an unbounded encoder layer of level l holds floor(tokens / S_l) keys and
        values. Constant are encoders with a window, the token stream's layers, isolated decoders (R + C - 1), and the
        states of open chunks and slots.
        """
        growing = constant = buffers = 0
        for index, level in enumerate(self.config.levels):
            units, window = tokens // self.config.span(index + 1), level["encoder_window"]
            if window is None:
                growing += level["encoder_layers"] * units
            else:
                constant += level["encoder_layers"] * window
            buffers += level["chunk_size"] + level["num_slots"]
        constant += sum(
            level["decoder_layers"] * (level["num_slots"] + level["chunk_size"] - 1) for _, level in self._isolated
        )
        if self._stream:
            constant += self.config.levels[0]["decoder_layers"] * self._ring()
        return growing * self.shape.kv, constant * self.shape.kv + buffers * self.shape.hidden

    def flops(self, context: int) -> float:
        """Forward FLOPs of the token after `context` tokens, the work at unit rate spread over the tokens of a unit."""
        config, shape, keys = self.config, self.shape, 0.0
        weights = self.layer_positions * shape.layer_matrices + shape.vocab * shape.hidden
        for index, level in enumerate(config.levels):
            span, window = config.span(index + 1), level["encoder_window"]
            weights += (level["chunk_size"] + level["num_slots"]) * shape.hidden**2 / span
            seen = context // span if window is None else min(context // span, window)
            keys += level["encoder_layers"] * seen / span
        for index, level in self._isolated:
            group = level["num_slots"] + level["chunk_size"] - 1
            keys += level["decoder_layers"] * group * (group + 1) / 2 / config.span(index + 1)
        if self._stream:
            near = config.levels[0]["decoder_layers"] * min(context, self._ring())
            keys += self._stream_positions * near
        return shape.flops(weights, keys)
