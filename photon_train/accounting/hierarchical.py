"""What a hierarchical model costs (presets ``split`` and ``paper``)."""

from __future__ import annotations

from typing import Any

from photon_train.accounting.shape import Shape


class Hierarchical:
    """Closed formulas for a configuration with the attributes of `HierarchicalConfig`; attributes as in `Graft`."""

    inputs = 2  # the hierarchy reads the embeddings too, padded to whole top units
    memory_states, fit_bytes = (0.0, 0.0), 0

    def __init__(self, config: Any) -> None:
        self.config, self.dense, self.shape = config, config.base_config, Shape.of(config.base_config)
        self.unit = config.top_unit_tokens
        self.num_layers = sum(level["encoder_layers"] + level["decoder_layers"] for level in config.levels)
        # Per level: positions per token of an encoder layer and of a decoder layer.
        self._units = [1 / config.unit_tokens(index + 1) for index in range(len(config.levels))]
        self._decoders = [config.slot_stream(index) for index in range(len(config.levels))]
        groups = [stream.period * rate for stream, rate in zip(self._decoders, self._units, strict=True)]
        self.widest = max(*self._units, *groups)
        self.layer_positions = sum(
            level["encoder_layers"] * units + level["decoder_layers"] * group
            for level, units, group in zip(config.levels, self._units, groups, strict=True)
        )

    @property
    def new_parameters(self) -> int:
        """Parameters of chunkers, converters and their scales, input scales and the start state."""
        hidden = self.shape.hidden
        sizes = [(level["chunk_size"] + level["num_slots"]) * hidden**2 + 3 for level in self.config.levels]
        return hidden + sum(sizes)

    def growing_per_token(self, dtype_bytes: int) -> float:
        """Bytes that a token adds to the cache, on average."""
        return (
            dtype_bytes
            * self.shape.kv
            * sum(
                level["encoder_layers"] * units
                for level, units in zip(self.config.levels, self._units, strict=True)
                if level["encoder_window"] is None
            )
        )

    def cache(self, tokens: int, dtype_bytes: int) -> tuple[int, int]:
        """Bytes of `HierarchicalCache` for one sequence of `tokens`: those that grow with the text, and the others.

        With S_l tokens under a level-l unit, an unbounded encoder layer of level l holds floor(tokens / S_l) keys and
        values. Constant are encoders with a window, decoders, and the states of open chunks.
        """
        growing = constant = buffers = 0
        for index, (level, stream) in enumerate(zip(self.config.levels, self._decoders, strict=True)):
            window = level["encoder_window"]
            if window is None:
                growing += level["encoder_layers"] * (tokens // self.config.unit_tokens(index + 1))
            else:
                constant += level["encoder_layers"] * window
            constant += level["decoder_layers"] * (stream.num_sinks + stream.ring_size)
            buffers += level["chunk_size"]
        constant = constant * self.shape.kv + buffers * self.shape.hidden
        return growing * self.shape.kv * dtype_bytes, constant * dtype_bytes

    def flops(self, context: int) -> float:
        """Forward FLOPs of the token after `context` tokens, the work at unit rate spread over the tokens of a unit."""
        shape, keys = self.shape, 0.0
        weights = self.layer_positions * shape.layer_matrices + shape.vocab * shape.hidden
        for level, stream, units in zip(self.config.levels, self._decoders, self._units, strict=True):
            weights += (level["chunk_size"] + level["num_slots"]) * shape.hidden**2 * units
            seen, window = int(context * units), level["encoder_window"]
            keys += level["encoder_layers"] * units * (seen if window is None else min(seen, window))
            # Of isolated groups an element sees the half before it, of a stream its window.
            elements = int(context * units * stream.period)
            near = (stream.period + 1) / 2 if stream.isolated else min(elements, stream.num_sinks + stream.reach + 1)
            keys += level["decoder_layers"] * units * stream.period * near
        return shape.flops(weights, keys)
