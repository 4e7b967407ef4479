"""`HierarchicalCache`: what the hierarchical model keeps of earlier tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .cache_photon import RowCache
from .configuration_hierarchical import HierarchicalConfig
from .stores_photon import GrowingStore, RingStore, key_value_parts

PROTOCOLS = ("hiergen", "recgen")


class HierarchicalCache(RowCache):
    """Cache of `HierarchicalForCausalLM`; every row has its own length and phase.

    Grows with the text: encoders without a window, by one key and value per unit. Everything else is constant.

    Args:
        config: The model's.
        protocol: What is fed upward after the first pass; see `HierarchicalForCausalLM.set_protocol`.
        growing: Makes the stores that grow, ``growing(formats, unit_tokens)``.

    Attributes:
        encoders: Per level, the encoder's units.
        decoders: Per level, the decoder's latest elements.
        open: Per level, the states of the open chunk's children, ``[rows, C, d]``; child k lies in slot ``k % C``.
        conditions: With `recgen`, per level below the top: what the decoder above predicts of the open unit,
            ``[rows, d]``.
        run: How a piece of one-token decoding is run, ``run(piece, level, rows, *tensors)``; None calls it. `rows` and
            tensors have an element per row, and the shapes of all that it computes follow from their number.
    """

    def __init__(
        self,
        config: HierarchicalConfig,
        protocol: str = "hiergen",
        growing: Callable[..., GrowingStore] = GrowingStore,
    ) -> None:
        super().__init__()
        if protocol not in PROTOCOLS:
            raise ValueError(f"protocol {protocol!r} is not one of {', '.join(PROTOCOLS)}")
        self.config, self.protocol, self._make_growing = config, protocol, growing
        self.run: Callable | None = None
        self.open: list[torch.Tensor] = []
        self.conditions: list[torch.Tensor] = []
        self.encoders: list[RingStore | GrowingStore] = []
        self.decoders: list[RingStore] = []
        for index, level in enumerate(config.levels):
            layers, window = range(level["encoder_layers"]), level["encoder_window"]
            if window is None:
                formats = dict.fromkeys(layers, key_value_parts(config))
                self.encoders.append(growing(formats, config.unit_tokens(index + 1)))
            else:
                self.encoders.append(RingStore(layers, 0, window))
            stream = config.slot_stream(index)
            self.decoders.append(RingStore(range(level["decoder_layers"]), stream.num_sinks, stream.ring_size))

    def rings(self) -> list[RingStore]:
        return [*self.decoders, *(store for store in self.encoders if isinstance(store, RingStore))]

    def growing(self) -> list[GrowingStore]:
        return [store for store in self.encoders if not isinstance(store, RingStore)]

    def allocate(
        self, rows: int, heads: int, head_dim: int, like: torch.Tensor, states: torch.Tensor | None = None
    ) -> None:
        """Make `rows` empty rows; keys and values have the type of `like`, buffers that of `states` (or `like`)."""
        super().allocate(rows, heads, head_dim, like)
        states, size = like if states is None else states, self.config.hidden_size
        self.open = [states.new_zeros(rows, level["chunk_size"], size) for level in self.config.levels]
        if self.protocol == "recgen":
            self.conditions = [states.new_zeros(rows, size) for _ in self.config.levels[1:]]

    def row_tensors(self) -> list[torch.Tensor]:
        return [*super().row_tensors(), *self.open, *self.conditions]

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self.open, self.conditions = (
            [states.index_select(0, indices.to(states.device)) for states in buffers]
            for buffers in (self.open, self.conditions)
        )

    def __len__(self) -> int:
        return self.config.num_hidden_layers

    def reset(self) -> None:
        """Forget everything."""
        run = self.run
        self.__init__(self.config, self.protocol, self._make_growing)
        self.run = run

    def kv_bytes(self) -> dict[str, int]:
        """Bytes of the whole batch: keys and values `growing` and `constant`; `buffers`: open chunks and conditions."""
        lengths = [] if self.lengths is None else self.lengths.tolist()
        growing = sum(store.nbytes([length // store.unit_tokens for length in lengths]) for store in self.growing())
        return {
            "growing": growing,
            "constant": sum(ring.nbytes() for ring in self.rings()),
            "buffers": sum(t.numel() * t.element_size() for t in (*self.open, *self.conditions)),
        }

    def crop(self, max_length: int) -> None:
        """Not possible.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "HierarchicalCache cannot be cropped: completed chunks cannot be taken apart; generate without an "
            "assistant model or prompt lookup"
        )
