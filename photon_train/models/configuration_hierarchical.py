"""Configuration of the hierarchical model (arXiv 2512.20687): chunkers, encoders, converters and decoders by level."""

from __future__ import annotations

import math
from typing import Any

from transformers import PretrainedConfig

from .families_photon import LLAMA_LIKE, config_class
from .slot_stream_hierarchical import SlotStream

LAYOUTS = ("block", "stream")
LEVEL_DEFAULTS = {
    "chunk_size": 4,
    "num_slots": 1,
    "encoder_layers": 1,
    "encoder_window": None,
    "decoder_layers": 1,
}
# What generate, Trainer, peft and serving code read from any causal LM's configuration: derived from `base_config`.
_DERIVED = (
    "vocab_size",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "initializer_range",
    "num_hidden_layers",
)


class HierarchicalConfig(PretrainedConfig):
    """Settings of `HierarchicalForCausalLM`.

    Level l of the paper (l = 1 ... L) is ``levels[l - 1]`` here. What a layer sees follows from these settings alone; a
    sliding window of the dense family itself has no influence.

    Args:
        base_config: The dense family's configuration as a dict with its ``model_type``: hidden size, heads, rotary
            embedding, vocabulary and special tokens of every stack. Default: a Llama.
        levels: One dict per level, from the lowest up: ``chunk_size`` (C_l), ``num_slots`` (R_l), ``encoder_layers``,
            ``encoder_window`` (units that the encoder sees; None: all), ``decoder_layers``.
            ``levels[0]["decoder_layers"]`` is the depth of the token decoder.
        layout: ``block``: the token decoder sees isolated chunks of R_1 slots and their tokens (the paper);
            ``stream``: one causal stream with R_1 slots before each chunk's tokens, a sliding window and sinks.
        window: Tokens that an element of the stream sees, its own included; None with ``block``.
        num_sinks: First tokens of the stream that stay visible, with the slots before and between them.
        consistency_weight: Weight of the recursive-consistency loss (levels >= 2) in training.
        use_cache: Whether a forward returns a cache by default.
        **kwargs: As for every configuration of transformers.

    Raises:
        ValueError: for a family that is not supported and settings that no model can serve; the message names the key
            and the fix.
    """

    model_type = "photon_hierarchical"
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(
        self,
        base_config: dict[str, Any] | None = None,
        levels: list[dict[str, Any]] | None = None,
        layout: str = "block",
        window: int | None = None,
        num_sinks: int = 0,
        consistency_weight: float = 0.0,
        use_cache: bool = True,
        **kwargs: Any,
    ) -> None:
        self.base_config = dict(base_config or {"model_type": "llama"})
        self.levels = [{**LEVEL_DEFAULTS, **level} for level in (levels or [{}])]
        self.layout = layout
        self.window = window
        self.num_sinks = num_sinks
        self.consistency_weight = consistency_weight
        self.use_cache = use_cache
        self._check()
        base = self.dense_config()
        for key in _DERIVED:
            kwargs.pop(key, None)
        self.vocab_size = base.vocab_size
        self.hidden_size = base.hidden_size
        self.num_attention_heads = base.num_attention_heads
        self.num_key_value_heads = base.num_key_value_heads
        self.head_dim = getattr(base, "head_dim", None) or base.hidden_size // base.num_attention_heads
        self.max_position_embeddings = base.max_position_embeddings
        self.initializer_range = base.initializer_range
        self.num_hidden_layers = sum(level["encoder_layers"] + level["decoder_layers"] for level in self.levels)
        for token in ("bos_token_id", "eos_token_id", "pad_token_id"):
            kwargs.setdefault(token, getattr(base, token, None))
        kwargs.setdefault("tie_word_embeddings", base.tie_word_embeddings)
        super().__init__(**kwargs)

    def dense_config(self) -> PretrainedConfig:
        """The dense family's configuration."""
        settings = dict(self.base_config)
        return config_class(settings.pop("model_type"))(**settings)

    @property
    def num_levels(self) -> int:
        """L, the levels above the tokens."""
        return len(self.levels)

    def unit_tokens(self, level: int) -> int:
        """S_l = C_1 ... C_l, the tokens under one unit of level l; ``unit_tokens(0)`` is 1."""
        return math.prod(entry["chunk_size"] for entry in self.levels[:level])

    @property
    def top_unit_tokens(self) -> int:
        """S_L, the tokens under one unit of the top level."""
        return self.unit_tokens(self.num_levels)

    def slot_stream(self, index: int) -> SlotStream:
        """The sequence of the decoder of ``levels[index]``."""
        level = self.levels[index]
        if index == 0 and self.layout == "stream":
            return SlotStream(level["num_slots"], level["chunk_size"], self.window, self.num_sinks)
        return SlotStream(level["num_slots"], level["chunk_size"])

    def _check(self) -> None:
        def need(condition: bool, message: str) -> None:
            if not condition:
                raise ValueError(message)

        need(self.layout in LAYOUTS, f"layout={self.layout!r} is not one of {', '.join(LAYOUTS)}")
        need("model_type" in self.base_config, "base_config has no `model_type`: give the dense family's configuration")
        name = self.base_config["model_type"]
        need(name in LLAMA_LIKE, f"base_config.model_type={name!r} is not one of {', '.join(LLAMA_LIKE)}")
        dropout = self.base_config.get("attention_dropout") or 0.0
        need(not dropout, f"base_config.attention_dropout={dropout} is not supported: set it to 0")
        for index, level in enumerate(self.levels):
            name = f"levels.{index}"
            unknown = sorted(set(level) - set(LEVEL_DEFAULTS))
            need(not unknown, f"{name} has unknown keys {unknown}; known: {sorted(LEVEL_DEFAULTS)}")
            for key in ("chunk_size", "num_slots", "encoder_layers", "decoder_layers"):
                value = level[key]
                need(_is_whole(value, 1), f"{name}.{key}={value!r} must be a whole number >= 1")
            window = level["encoder_window"]
            need(
                window is None or _is_whole(window, 1),
                f"{name}.encoder_window={window!r} must be a whole number >= 1, or null for unbounded",
            )
        need(self.top_unit_tokens >= 2, "the levels' chunk sizes must multiply to at least 2: raise a chunk_size")
        need(_is_whole(self.num_sinks, 0), f"num_sinks={self.num_sinks!r} must be a whole number >= 0")
        if self.layout == "block":
            need(self.window is None, f"layout=block has no window: leave window={self.window} out, or use stream")
            need(self.num_sinks == 0, f"layout=block has no sinks: set num_sinks={self.num_sinks} to 0, or use stream")
        else:
            need(
                _is_whole(self.window, self.top_unit_tokens),
                f"window={self.window!r} does not reach back over the open unit: it must be at least the tokens under "
                f"one top unit ({self.top_unit_tokens}); raise window or lower a chunk_size",
            )


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
