"""What PHOTON is measured against: a dense model decoded by transformers, with different caches of one prompt."""

from __future__ import annotations

import torch
from transformers import Cache, PreTrainedModel, QuantizedCache, StaticCache
from transformers.cache_utils import DynamicCache, DynamicLayer

KINDS = ("dynamic", "static", "window", "fp8")


def available(kind: str, model: PreTrainedModel) -> bool:
    """Whether the installed transformers has caches of `kind` (`fp8` came after 5.17)."""
    if kind != "fp8":
        return True
    try:
        QuantizedCache("fp8", model.config)
    except ValueError:
        return False
    return True


class SinkWindowLayer(DynamicLayer):
    """Keeps the first `num_sinks` tokens and the last `window`; keys stay rotated at their own positions.

    transformers has had no such cache since version 5. A query sees the sinks and the window, itself included. Only
    single tokens may be added once the window is full; the prompt comes from `repeated`.
    """

    def __init__(self, window: int, num_sinks: int, seen: int) -> None:
        super().__init__()
        self.window, self.num_sinks, self.seen = window, num_sinks, seen

    def update(self, key_states, value_states, *args, **kwargs):
        self.seen += key_states.shape[2]
        keys, values = super().update(key_states, value_states)
        if keys.shape[2] > self.num_sinks + self.window:
            self.keys, self.values = self.trim(keys), self.trim(values)
        return self.keys, self.values

    def trim(self, states: torch.Tensor) -> torch.Tensor:
        """Sinks and window of ``[B, H, N, D]``."""
        return torch.cat([states[:, :, : self.num_sinks], states[:, :, -self.window :]], dim=2)

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.num_sinks + self.window, self.seen + query_length - self.num_sinks - self.window


def window_mask(length: int, window: int, num_sinks: int, device: torch.device) -> torch.Tensor:
    """What each token of a sequence sees with a window and sinks, ``[1, 1, length, length]``, boolean."""
    key, query = torch.arange(length, device=device), torch.arange(length, device=device)[:, None]
    return ((key <= query) & ((key > query - window) | (key < num_sinks)))[None, None]


@torch.no_grad()
def encode(model: PreTrainedModel, ids: torch.Tensor, segment: int = 4096) -> DynamicCache:
    """The cache of ``ids [1, T]`` at full attention, filled in segments."""
    cache = DynamicCache(config=model.config)
    for part in ids.split(segment, dim=1):
        model(part, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


@torch.no_grad()
def encode_windowed(model: PreTrainedModel, ids: torch.Tensor, window: int, num_sinks: int) -> DynamicCache:
    """The cache of ``ids [1, T]`` where every token has seen its window and the sinks alone."""
    cache = DynamicCache(config=model.config)
    mask = window_mask(ids.shape[1], window, num_sinks, ids.device)
    model(ids, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


def filled_at_random(model: PreTrainedModel, length: int, device: str | torch.device) -> DynamicCache:
    """A cache of `length` tokens with any content: decoding from it takes as long as from a prompt's."""
    cache, config = DynamicCache(config=model.config), model.config
    shape = (1, config.num_key_value_heads, length, config.head_dim)
    for index in range(config.num_hidden_layers):
        cache.update(*(torch.randn(shape, device=device, dtype=model.dtype) for _ in range(2)), index)
    return cache


@torch.no_grad()
def repeated(
    model: PreTrainedModel, cache: DynamicCache, kind: str, batch: int, room: int, window: int = 0, num_sinks: int = 0
) -> Cache:
    """A cache of `kind` with `batch` rows that all hold what `cache` holds for one.

    Args:
        room: Tokens that will be added.
        window, num_sinks: Of kind `window`.
    """
    length = cache.get_seq_length()
    if kind == "static":
        target = StaticCache(config=model.config, max_cache_len=length + room)
    elif kind == "fp8":
        target = QuantizedCache("fp8", model.config)
    else:
        target = DynamicCache(config=model.config)
    for index, layer in enumerate(cache.layers):
        keys, values = layer.keys.to(model.device), layer.values.to(model.device)
        if kind == "window":
            own = SinkWindowLayer(window, num_sinks, length)
            own.lazy_initialization(keys, values)
            own.keys, own.values = (own.trim(s) if length > num_sinks + window else s for s in (keys, values))
            own.keys, own.values = own.keys.repeat(batch, 1, 1, 1), own.values.repeat(batch, 1, 1, 1)
            target.layers[index : index + 1] = [own]
        else:
            target.update(keys.expand(batch, -1, -1, -1), values.expand(batch, -1, -1, -1), index)
    return target


def cache_bytes(cache: Cache) -> int:
    """Bytes of the keys and values of all rows."""
    stored = []
    for layer in cache.layers:
        quantised = getattr(layer, "_quantized_keys", None)
        stored += [layer.keys, layer.values] if quantised is None else [quantised[0], layer._quantized_values[0]]
    return sum(states.numel() * states.element_size() for states in stored)
