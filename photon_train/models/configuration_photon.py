"""Configuration of a PHOTON model: the dense family's own, and what its attention sees."""

from __future__ import annotations

import functools
from typing import Any

from transformers import PretrainedConfig

from .families_photon import RECURRENT, config_class

# Bits of a number of a latent in the cache; 16 stands for the cache's own type.
MEMORY_BITS = (16, 8, 4)
# Keys of PHOTON beside the family's.
PHOTON_KEYS = (
    "base_model_type",
    "window",
    "num_sinks",
    "chunk_size",
    "memory_cells",
    "memory_bits",
    "latents_per_unit",
    "full_attention_layers",
)


class PhotonConfig(PretrainedConfig):
    """Settings of `PhotonForCausalLM`: all fields of the dense family's configuration, and these.

    An instance is one of the family's configuration class too: ``PhotonConfig(base_model_type="llama", ...)`` is a
    `LlamaConfig` with the same keys, defaults and checks.

    Args:
        base_model_type: ``model_type`` of the dense family.
        window: Tokens that a windowed layer sees, the query's own included. With a memory the window reaches back to a
            multiple of `chunk_size`, so that no token falls between the window and the units.
        num_sinks: First tokens that stay visible in every windowed layer.
        chunk_size: S, the tokens under one memory unit.
        memory_cells: By windowed layer, the key-value heads whose queries also read the units outside the window.
        memory_bits: Bits in which the cache stores a number of a latent: 16 (the cache's own type), 8 or 4.
        latents_per_unit: Latents of a unit: 1 packs keys and values together, 2 apart, each into its half.
        full_attention_layers: Layers that keep full causal attention.
        **kwargs: The family's fields.

    Raises:
        ValueError: for a family that is not supported and settings that no model can serve; the message names the key
            and the fix.
    """

    model_type = "photon"

    def __new__(cls, base_model_type: str = "llama", **kwargs: Any) -> PhotonConfig:
        return super().__new__(photon_config_class(base_model_type))

    def __init__(
        self,
        base_model_type: str = "llama",
        window: int = 256,
        num_sinks: int = 4,
        chunk_size: int = 4,
        memory_cells: dict[int, list[int]] | None = None,
        memory_bits: int = 16,
        latents_per_unit: int = 1,
        full_attention_layers: list[int] | None = None,
        **kwargs: Any,
    ) -> None:
        if old := [key for key in ("base_config", "levels", "memory_layers") if key in kwargs]:
            raise ValueError(
                f"this configuration has the layout of an older photon-train ({old[0]}): convert the dense model again"
            )
        self.base_model_type = base_model_type
        self.window = window
        self.num_sinks = num_sinks
        self.chunk_size = chunk_size
        # JSON makes names of numbers.
        self.memory_cells = {int(layer): sorted(heads) for layer, heads in _by_layer(memory_cells or {})}
        self.memory_bits = memory_bits
        self.latents_per_unit = latents_per_unit
        self.full_attention_layers = sorted(full_attention_layers or [])
        kwargs.pop("model_type", None)
        super().__init__(**kwargs)
        # Qwen2 leaves it out.
        self.head_dim = getattr(self, "head_dim", None) or self.hidden_size // self.num_attention_heads
        self._check()

    def __reduce__(self):
        # The class of a family's instance is made at run time and has no importable name.
        return _restore, (self.base_model_type,), self.__dict__

    @classmethod
    def is_custom_code(cls) -> bool:
        """No: transformers 5.17 renames the layers of custom code, and its LFM2 knows its own by the old name only."""
        return False

    @property
    def memory_layers(self) -> list[int]:
        """Layers with memory, in order."""
        return list(self.memory_cells)

    @property
    def recurrent_layers(self) -> list[int]:
        """Layers of a hybrid that have a state in place of attention."""
        kinds = getattr(self, "layer_types", None) or []
        return [layer for layer, kind in enumerate(kinds[: self.num_hidden_layers]) if kind in RECURRENT]

    def dense_config(self) -> PretrainedConfig:
        """The dense family's configuration, without PHOTON's keys."""
        settings = {key: value for key, value in self.to_dict().items() if key not in (*PHOTON_KEYS, "model_type")}
        return config_class(self.base_model_type)(**settings)

    def family_window(self, layer: int) -> int | None:
        """The window that the dense family itself gives `layer` (sliding layers of Mistral, Qwen), or None."""
        window = getattr(self, "sliding_window", None)
        kinds = getattr(self, "layer_types", None)
        if kinds is not None:
            return window if kinds[layer] == "sliding_attention" else None
        return window

    def is_local(self, layer: int) -> bool:
        """Whether `layer` keeps the family's own window: that of a local layer among global ones."""
        if self.family_window(layer) is None:
            return False
        kinds = getattr(self, "layer_types", None) or []
        return any(kind != "sliding_attention" for kind in kinds[: self.num_hidden_layers])

    def has_window(self, layer: int) -> bool:
        """Whether `layer` has PHOTON's window and sinks."""
        return layer not in self.full_attention_layers and not self.is_local(layer)

    def window_start(self, position: Any) -> Any:
        """First token that the window of a query at `position` (a number or a tensor) covers; 0 or less: all.

        It is moved back to a multiple of the chunk: the unit that holds the oldest token is then covered whole.
        """
        start = position - self.window + 1
        return start - start % self.chunk_size if self.memory_cells else start

    def num_units(self, length: Any) -> Any:
        """Units outside the window of the last of `length` tokens (a number or a tensor)."""
        start = self.window_start(length - 1)
        return (max(0, start) if isinstance(start, int) else start.clamp(min=0)) // self.chunk_size

    @property
    def ring_size(self) -> int:
        """Cache slots of a windowed layer beside its sinks.

        The longest window, and the unit that has left it last: it is packed from here.
        """
        return self.window + (2 * self.chunk_size - 1 if self.memory_cells else 0)

    def _check(self) -> None:
        def need(condition: bool, message: str) -> None:
            if not condition:
                raise ValueError(message)

        for key, least in (("window", 1), ("num_sinks", 0), ("chunk_size", 1)):
            value = getattr(self, key)
            need(isinstance(value, int) and value >= least, f"{key}={value!r} must be a whole number >= {least}")
        need(self.latents_per_unit in (1, 2), f"latents_per_unit={self.latents_per_unit} must be 1 or 2")
        need(self.memory_bits in MEMORY_BITS, f"memory_bits={self.memory_bits} must be 16, 8 or 4")
        layers, heads = range(self.num_hidden_layers), range(self.num_key_value_heads)
        for key in ("memory_cells", "full_attention_layers"):
            named = list(getattr(self, key))
            need(len(set(named)) == len(named), f"{key} names a layer twice: {named}")
            for layer in named:
                need(layer in layers, f"{key} names layer {layer}; the model has layers 0...{len(layers) - 1}")
                need(layer not in self.recurrent_layers, f"{key} names layer {layer}, which has no attention: drop it")
        both = sorted(set(self.memory_cells) & set(self.full_attention_layers))
        need(not both, f"layers {both} are in memory_cells and in full_attention_layers: keep one")
        for layer, named in self.memory_cells.items():
            need(not self.is_local(layer), f"memory_cells names layer {layer}, which the family keeps local: drop it")
            need(bool(named), f"memory_cells names no head of layer {layer}: name one, or drop the layer")
            need(len(set(named)) == len(named), f"memory_cells names a head of layer {layer} twice: {named}")
            for head in named:
                need(
                    head in heads,
                    f"memory_cells names key-value head {head} of layer {layer}; there are 0...{len(heads) - 1}",
                )
        if self.memory_cells:
            need(
                self.window >= self.chunk_size,
                f"window={self.window} is shorter than chunk_size={self.chunk_size}: raise it, or lower chunk_size",
            )
        for layer in layers:
            own = self.family_window(layer)
            need(
                own is None or not self.has_window(layer) or self.window <= own,
                f"window={self.window} exceeds the dense model's sliding_window={own}: lower it",
            )
        need(
            not getattr(self, "attention_dropout", 0.0),
            f"attention_dropout={getattr(self, 'attention_dropout', 0.0)} is not supported: set it to 0",
        )


def _by_layer(cells: dict[Any, list[int]]) -> list[tuple[Any, list[int]]]:
    """Layers and their heads, by layer."""
    return sorted(cells.items(), key=lambda cell: int(cell[0]))


@functools.cache
def photon_config_class(base_model_type: str) -> type[PhotonConfig]:
    """`PhotonConfig` for a family: a subclass of the family's configuration."""
    base = config_class(base_model_type)
    members = {"__init__": PhotonConfig.__init__, "__module__": __name__, "model_type": PhotonConfig.model_type}
    # The name is what a saved configuration refers to; the family's other code looks for its own class by this one.
    return type("PhotonConfig", (PhotonConfig, base), members)


def _restore(base_model_type: str) -> PhotonConfig:
    return object.__new__(photon_config_class(base_model_type))
