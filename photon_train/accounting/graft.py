"""What a `graft` costs: the dense model with a window and a memory in its attention."""

from __future__ import annotations

from typing import Any

from photon_train.accounting.shape import Shape

# Of the moments that the fit of the memory holds at a time.
_FIT_BYTES = 4 * 2**30


_SCALE_BYTES = 2  # of one head's half of a latent that is stored in fewer than 16 bits


def unit_bytes(heads: int, head_dim: int, bits: int, dtype_bytes: int = 2) -> int:
    """Bytes that the cache stores of one memory unit of a layer.

    Args:
        heads: Key-value heads with memory.
        bits: Of a number; 16 stands for `dtype_bytes`.
    """
    half = head_dim * dtype_bytes if bits == 16 else head_dim * bits // 8 + _SCALE_BYTES
    return 2 * heads * half


def cells_within(budget: float, dense: Any, chunk_size: int, bits: int) -> float:
    """Memory cells whose growing bytes are `budget` percent of the dense model's in a 16-bit cache."""
    shape = Shape.of(dense)
    # A dense model whose layers all have windows is measured by what it would hold without them.
    layers = shape.windows.count(None) or shape.layers
    whole = layers * shape.kv * 2
    return budget / 100 * whole * chunk_size / unit_bytes(1, shape.head_dim, bits)


class Graft:
    """Closed formulas for a configuration with the attributes of `PhotonConfig`.

    Attributes:
        dense: Configuration of the dense model; shape: its sizes.
        unit: Tokens under the largest unit.
        num_layers: Decoder layers.
        layer_positions: Positions that go through a decoder layer per token.
        widest: Positions per token of the stack that has the most.
        inputs: Copies of the embeddings that autograd keeps.
    """

    inputs = 1

    def __init__(self, config: Any) -> None:
        self.config, self.dense, self.shape, self.unit = config, config, Shape.of(config), config.chunk_size
        self.num_layers = self.shape.layers
        self.layer_positions, self.widest = float(self.num_layers), 1.0
        layers = [layer for layer in range(self.num_layers) if layer not in self.shape.recurrent]
        self._windowed = sum(config.has_window(layer) for layer in layers)
        # The family's own windows where PHOTON's does not take their place; None: full attention.
        kept = [config.family_window(layer) for layer in layers if not config.has_window(layer)]
        self._local, self._full = [own for own in kept if own is not None], kept.count(None)
        # Key-value heads with memory, by memory layer.
        self._heads = [len(heads) for heads in config.memory_cells.values()]

    def _width(self, heads: int) -> int:
        """Numbers of the keys and values of so many heads."""
        return 2 * heads * self.shape.head_dim

    def _latent(self, heads: int) -> int:
        """Numbers of one latent of a layer's unit."""
        return self._width(heads) // self.config.latents_per_unit

    @property
    def new_parameters(self) -> int:
        """Parameters of the memory layers' chunkers and converters, biases included."""
        chunk = self.config.chunk_size
        return sum(self._width(m) * (chunk * (2 * self._latent(m) + 1) + 1) for m in self._heads)

    @property
    def memory_states(self) -> tuple[float, float]:
        """Elements that autograd keeps per token of all memory layers, and of the widest, beside what every layer
        keeps.

        The unrotated queries, the keys and values that are packed and those that are unpacked, and the latents.
        """
        groups = self.shape.heads // self.shape.kv_heads
        kept = [
            m * groups * self.shape.head_dim + self._width(m) * (2 + 1 / self.config.chunk_size) for m in self._heads
        ]
        return sum(kept), max(kept, default=0.0)

    @property
    def _moments(self) -> list[int]:
        """Of each memory layer, the bytes of one latent's moments: two fp64 matrices of a unit's numbers each."""
        return [16 * (self.config.chunk_size * self._latent(m)) ** 2 for m in self._heads]

    @property
    def fit_at_once(self) -> int:
        """Latents whose moments the fit holds at a time, 1 or more."""
        return max(1, _FIT_BYTES // max(self._moments, default=1))

    @property
    def fit_bytes(self) -> int:
        """Bytes that the fit of the memory takes beside the model: moments, and what one regression works on."""
        if not self._heads:
            return 0
        held = min(self.fit_at_once, len(self._heads) * self.config.latents_per_unit)
        return max(self._moments) * (held + 1)

    def _unit_bytes(self, dtype_bytes: int) -> int:
        """Bytes of one unit in all memory layers."""
        return unit_bytes(sum(self._heads), self.shape.head_dim, self.config.memory_bits, dtype_bytes)

    def growing_per_token(self, dtype_bytes: int) -> float:
        """Bytes that a token adds to the cache once its window is full."""
        return self.shape.kv * self._full * dtype_bytes + self._unit_bytes(dtype_bytes) / self.config.chunk_size

    def cache(self, tokens: int, dtype_bytes: int) -> tuple[int, int]:
        """Bytes of `PhotonCache` for one sequence of `tokens`: those that grow with the text, and the others.

        Layers at full attention grow by each token, memory layers by each unit that has left the window. A windowed
        layer always holds its sinks and its ring, a local one its own window, a recurrent one its states.
        """
        config = self.config
        growing = self._full * tokens * self.shape.kv * dtype_bytes
        if tokens:
            growing += config.num_units(tokens) * self._unit_bytes(dtype_bytes)
        constant = self._windowed * (config.num_sinks + config.ring_size) + sum(self._local)
        return growing, constant * self.shape.kv * dtype_bytes + self.shape.state_bytes(dtype_bytes)

    def flops(self, context: int) -> float:
        """Forward FLOPs of the token after `context` tokens; a unit's packing is spread over its tokens.

        A converter is folded into the queries of the cells: these then meet latents (of two per unit, their own one),
        once per token.
        """
        config, shape, chunk = self.config, self.shape, self.config.chunk_size
        weights = shape.all_matrices + shape.vocab * shape.hidden
        longest = config.window + (chunk - 1 if self._heads else 0)
        keys = self._full * context + sum(min(context, own) for own in self._local)
        keys += self._windowed * min(context, config.num_sinks + longest)
        far, groups = (config.num_units(context) * chunk if context else 0), shape.heads // shape.kv_heads
        for m in self._heads:
            latent = self._latent(m)
            weights += self._width(m) * latent + 2 * chunk * latent * m * groups * shape.head_dim
            keys += far * latent / shape.head_dim * m / shape.kv_heads
        return shape.flops(weights, keys)
