"""What a `graft` costs: the dense model with a window and a memory in its attention."""

from __future__ import annotations

from typing import Any

from photon_train.accounting.shape import Shape

# Of the moments that the fit of the memory holds at a time.
_FIT_BYTES = 4 * 2**30


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
        layers = range(self.num_layers)
        self._windowed = sum(config.has_window(layer) for layer in layers)
        # The family's own windows where PHOTON's does not take their place; None: full attention.
        kept = [config.family_window(layer) for layer in layers if not config.has_window(layer)]
        self._local, self._full = [own for own in kept if own is not None], kept.count(None)
        self._memories = len(config.memory_layers)
        self._latent = self.shape.kv // config.latents_per_unit  # numbers of a latent's part

    @property
    def new_parameters(self) -> int:
        """Parameters of the memory layers' chunkers and converters (the latter with biases)."""
        return self._memories * self.config.chunk_size * self.shape.kv * (2 * self._latent + 1)

    @property
    def memory_states(self) -> tuple[int, float]:
        """Memory layers, and the elements that autograd keeps of one per token beside what every layer keeps.

        The unrotated queries, the keys and values that are packed and those that are unpacked, and the latents.
        """
        kept = self.shape.linears["q_proj"][0] + self.shape.kv * (2 + 1 / self.config.chunk_size)
        return self._memories, kept

    @property
    def fit_at_once(self) -> int:
        """Latents whose moments (two fp64 matrices of a unit's numbers each) the fit holds at a time, 1 or more."""
        return max(1, _FIT_BYTES // (16 * (self.config.chunk_size * self._latent) ** 2))

    @property
    def fit_bytes(self) -> int:
        """Bytes that the fit of the memory takes beside the model: moments, and what one regression works on."""
        if not self._memories:
            return 0
        square = (self.config.chunk_size * self._latent) ** 2
        held = min(self.fit_at_once, self._memories * self.config.latents_per_unit)
        return 16 * square * (held + 1)

    @property
    def growing_per_token(self) -> float:
        """Elements that a token adds to the cache once its window is full."""
        return self.shape.kv * (self._full + self._memories / self.config.chunk_size)

    def cache(self, tokens: int) -> tuple[int, int]:
        """Elements of `PhotonCache` for one sequence of `tokens`: those that grow with the text, and the others.

        Layers at full attention grow by each token, memory layers by each unit that has left the window. A windowed
        layer always holds its sinks and its ring, a local one its own window.
        """
        config = self.config
        growing = self._full * tokens + (self._memories * config.num_units(tokens) if tokens else 0)
        constant = self._windowed * (config.num_sinks + config.ring_size) + sum(self._local)
        return growing * self.shape.kv, constant * self.shape.kv

    def flops(self, context: int) -> float:
        """Forward FLOPs of the token after `context` tokens; a unit's packing is spread over its tokens.

        A converter is folded into the queries: these then meet latents (of two per unit, their own one), once per
        token.
        """
        config, shape, chunk = self.config, self.shape, self.config.chunk_size
        weights = self.num_layers * shape.layer_matrices + shape.vocab * shape.hidden
        longest = config.window + (chunk - 1 if self._memories else 0)
        keys = self._full * context + sum(min(context, own) for own in self._local)
        keys += self._windowed * min(context, config.num_sinks + longest)
        packing = shape.kv * self._latent
        folding = 2 * chunk * self._latent * shape.heads * shape.head_dim
        weights += self._memories * (packing + folding)
        far = config.num_units(context) * chunk if context else 0
        return shape.flops(weights, keys + self._memories * far * self._latent / shape.head_dim)
