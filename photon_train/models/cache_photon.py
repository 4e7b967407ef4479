"""Caches of a batch: rows with a length each, and the interface of transformers' caches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import Cache, LinearAttentionLayer

from .configuration_photon import PhotonConfig
from .stores_photon import GrowingStore, RingStore, key_value_parts, latent_parts


class RowCache(Cache):
    """What the caches of all PHOTON models share: rows with a length each, and the interface of transformers' caches.

    Attributes:
        lengths: Tokens that each row holds, ``[rows]``; None while nothing is allocated.
        host_lengths: The same for the rows of the next pass, on the host; None asks `lengths`.
        rows: Rows of the next pass, ``[n]``; None: all, in order.
        is_static: Whether the next pass may not depend on what the host knows of lengths (`host_lengths` is not used).
        columns: Input columns seen, padding included (what transformers calls the sequence length).
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.lengths: torch.Tensor | None = None
        self.host_lengths: list[int] | None = None
        self.rows: torch.Tensor | None = None
        self.is_static = False
        self.columns = 0

    def rings(self) -> list[RingStore]:
        """The bounded stores."""
        raise NotImplementedError

    def growing(self) -> list[GrowingStore]:
        """The stores that grow with the text."""
        raise NotImplementedError

    def allocate(self, rows: int, heads: int, head_dim: int, like: torch.Tensor) -> None:
        """Make `rows` empty rows."""
        self.lengths = torch.zeros(rows, dtype=torch.long, device=like.device)
        if self.host_lengths is None:
            self.host_lengths = [0] * rows
        for ring in self.rings():
            ring.allocate(rows, heads, head_dim, like)
        for store in self.growing():
            store.allocate(rows, like)

    def row_tensors(self) -> list[torch.Tensor]:
        """Everything bounded that belongs to rows, rows first."""
        return [self.lengths, *(tensor for ring in self.rings() for tensor in ring.tensors())]

    def clear(self, row: int) -> None:
        """Empty a row; nothing of what it held is left (masked, a NaN would still reach results)."""
        for tensor in self.row_tensors():
            tensor[row] = 0
        for ring in self.rings():
            ring.index[row] = -1

    def past_lengths(self) -> tuple[torch.Tensor, list[int] | None]:
        """Tokens of each row of the next pass, ``[n]``, on the device and on the host (None: `is_static`)."""
        lengths = self.lengths if self.rows is None else self.lengths[self.rows]
        if self.is_static:
            return lengths, None
        if self.host_lengths is None:
            self.host_lengths = lengths.tolist()
        return lengths, self.host_lengths

    def advance(self, columns: int, new: torch.Tensor | int, host_new: list[int] | None) -> None:
        """After a pass of `columns` columns, in which each row got ``new [n]`` tokens."""
        self.columns += columns
        if self.rows is None:
            self.lengths = self.lengths + new
        else:
            self.lengths[self.rows] = self.lengths[self.rows] + new
        if self.host_lengths is not None and host_new is not None:
            self.host_lengths = [had + more for had, more in zip(self.host_lengths, host_new, strict=True)]

    # --- what transformers asks of a cache ---

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any):
        """The states as they are: PHOTON's attention reads and writes the cache itself."""
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Input columns seen, padding included."""
        return self.columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """No bound: -1."""
        return -1

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_initialized(self) -> bool:
        return self.lengths is not None

    @property
    def is_sliding(self) -> list[bool]:
        return [False]

    @property
    def batch_size(self) -> int:
        return 0 if self.lengths is None else self.lengths.shape[0]

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows `indices`, in that order (repeats allowed)."""
        if self.lengths is None:
            return
        indices = indices.to(self.lengths.device)
        self.lengths = self.lengths.index_select(0, indices)
        if self.host_lengths is not None:
            self.host_lengths = [self.host_lengths[index] for index in indices.tolist()]
        for store in (*self.rings(), *self.growing()):
            store.select(indices)
        for layer in self.layers:
            if layer is not None:
                layer.reorder_cache(indices)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Beam search: row i goes on from row ``beam_idx[i]``."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        if self.lengths is not None:
            rows = torch.arange(self.batch_size, device=self.lengths.device)
            self.batch_select_indices(rows.repeat_interleave(repeats))


class PhotonCache(RowCache):
    """Cache of `PhotonForCausalLM`.

    Grows with the text: memory layers (one latent per unit that has left the window) and full-attention layers (one key
    and value per token). Everything else is constant, such as the states of recurrent layers, which transformers' own
    cache layers hold. `accounting` has the formula.

    Args:
        config: The model's.
        rollback: Latest tokens that `crop` can take back at any length; windowed layers keep so many more.
        growing: Makes the stores that grow, ``growing(formats, unit_tokens)``.

    Raises:
        ValueError: for a `rollback` where layers are recurrent.

    Attributes:
        layers: By layer, the state of those that are recurrent, else None; empty where none is.
        window: Windowed layers; `local`: layers with the family's own window; `full`: full attention; `units`: latents
            of memory layers.
    """

    def __init__(
        self, config: PhotonConfig, rollback: int = 0, growing: Callable[..., GrowingStore] = GrowingStore
    ) -> None:
        super().__init__()
        self.config, self.rollback, self._make_growing = config, rollback, growing
        recurrent, windowed, local, full = config.recurrent_layers, [], {}, []
        if recurrent:
            self.layers = [LinearAttentionLayer() if layer in recurrent else None for layer in range(len(self))]
            self._refuse_rollback(rollback)
        for layer in range(config.num_hidden_layers):
            if layer in recurrent:
                continue
            own = config.family_window(layer)
            if config.has_window(layer):
                windowed.append(layer)
            elif own is not None:
                local.setdefault(own, []).append(layer)
            else:
                full.append(layer)
        self.window = RingStore(windowed, config.num_sinks, config.ring_size + rollback)
        self.local = {own: RingStore(layers, 0, own + rollback) for own, layers in local.items()}
        self.full = growing(dict.fromkeys(full, key_value_parts(config)), 1)
        self.units = growing(
            {layer: latent_parts(config, len(heads)) for layer, heads in config.memory_cells.items()}, config.chunk_size
        )

    def rings(self) -> list[RingStore]:
        return [self.window, *self.local.values()]

    def growing(self) -> list[GrowingStore]:
        return [self.full, self.units]

    @property
    def is_croppable(self) -> bool:
        """Whether tokens can be taken back."""
        return not self.layers

    def __len__(self) -> int:
        return self.config.num_hidden_layers

    def reset(self) -> None:
        """Forget everything."""
        self.__init__(self.config, self.rollback, self._make_growing)

    def kv_bytes(self) -> dict[str, int]:
        """Bytes of the whole batch's keys, values and states: `growing` and `constant`."""
        lengths = [] if self.lengths is None else self.lengths.tolist()
        units = [self.config.num_units(length) for length in lengths]
        return {
            "growing": self.full.nbytes(lengths) + self.units.nbytes(units),
            "constant": sum(ring.nbytes() for ring in self.rings()) + sum(t.nbytes for t in self._states()),
        }

    def _states(self) -> list[torch.Tensor]:
        held = (states for layer in self.layers if layer for states in (layer.conv_states, layer.recurrent_states))
        return [state for states in held for state in states.values() if state is not None]

    def _refuse_rollback(self, removed: int) -> None:
        if removed and self.layers:
            raise ValueError(
                f"the states of this {self.config.base_model_type} model's recurrent layers cannot take tokens back: "
                "generate without an assistant or prompt lookup"
            )

    def crop(self, tokens_to_remove: int) -> None:
        """Take the latest tokens of every row back, given as a negative number (as in transformers' caches).

        Raises:
            ValueError: for a positive number, more tokens than a row has, recurrent layers, and where windowed layers
                have overwritten what the shorter sequence sees. A cache made with `rollback` takes that many back at
                any length.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): give the tokens to take back as a negative number")
        removed = -tokens_to_remove
        if not removed or self.lengths is None:
            return
        self._refuse_rollback(removed)
        lengths, rows = self.lengths.tolist(), torch.arange(self.batch_size, device=self.lengths.device)
        for length in lengths:
            left = length - removed
            if left < 0:
                raise ValueError(f"crop({tokens_to_remove}) takes {removed} tokens back; a row has {length}")
            needed = max(0, self.config.window_start(left - 1))
            for ring in self.rings():
                if ring.layers and length - ring.ring_size > needed:
                    raise ValueError(
                        f"the window of a row of {length} tokens cannot take {removed} of them back: use "
                        f"PhotonCache(config, rollback={removed}), or generate without an assistant"
                    )
        self.lengths = self.lengths - removed
        self.host_lengths = self.lengths.tolist()
        self.columns -= removed
        for ring in self.rings():
            ring.forget(rows, self.lengths)
