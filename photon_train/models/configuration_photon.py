"""Configuration of a PHOTON model (arXiv 2512.20687): a hierarchy around a dense family's decoder layers."""

from __future__ import annotations

import math
from typing import Any

from transformers import AutoConfig, PretrainedConfig

LAYOUTS = ("stream", "block")
CONDITIONINGS = ("slots", "residual", "memory")
SUMMARIES = ("state", "change")
MEMORY_POOLINGS = ("mean", "linear", "latent")
UNIT_POSITIONS = ("index", "scaled")
LEVEL_DEFAULTS = {
    "chunk_size": 4,
    "num_slots": 1,
    "encoder_layers": 1,
    "encoder_window": None,
    "decoder_layers": 0,
}


class PhotonConfig(PretrainedConfig):
    """Settings of `PhotonForCausalLM`.

    Level ``l`` of the paper (l = 1 ... L) is ``levels[l - 1]`` here.

    Args:
        base_config: The dense family's configuration as a dict with its ``model_type``; gives the hidden
            size, heads, rotary embedding, vocabulary and special tokens of every stack.
        levels: One dict per level, from the lowest up: ``chunk_size`` (C_l), ``num_slots`` (R_l),
            ``encoder_layers``, ``encoder_window`` (units; None is unbounded), ``decoder_layers``.
            ``levels[0]["decoder_layers"]`` is the depth of the token decoder.
        layout: ``stream``: the token decoder is one causal stream with a sliding window;
            ``block``: isolated chunks of R_1 + C_1 positions (the paper).
        conditioning: How the hierarchy reaches a stream: ``slots`` (R_1 vectors before each chunk),
            ``residual`` (added to the chunk's states) or ``memory`` (chosen layers attend to units).
        window: Tokens a stream position sees, itself included. With ``memory`` the window reaches back to
            the start of the unit that holds its oldest token, so that no token falls between window and units.
        num_sinks: First tokens that stay visible in every stream layer.
        branch_layer: Token-decoder layers below the point where level 1 reads states and conditioning enters.
        memory_layers: Token-decoder layers that attend to completed units.
        memory_levels: The level (1 ... L) whose units each of `memory_layers` attends to.
        memory_pooling: How a memory layer makes a unit's key and value from its tokens': a weighted ``mean`` (with a
            correction by the encoder's state), or also a ``linear`` map per head and place, as the paper's chunker; or
            as a ``latent`` of the same size that gives a key and value per token when it is read (`latent_photon`).
        memory_sources: With ``latent``, the memory layer whose latents each of `memory_layers` reads; layers that
            share a source add growing KV once. Default: each its own.
        memory_latent_parts: Vectors that a latent consists of: 1 packs keys and values together; 2 apart, each into
            half of the latent, which halves the arithmetic of reading them.
        full_attention_layers: Token-decoder layers at full causal attention.
        summary: What the top encoder hands down: its ``state`` or the ``change`` it made (output - input).
        unit_positions: Rotary position of a unit: its ``index``, or ``scaled`` by the tokens under it.
        consistency_weight: Weight of the recursive-consistency loss (levels >= 2) in training.
        preset: Name of the conversion preset, for the record.

    Raises:
        ValueError: for settings that no model can serve; the message names the key and the mend.
    """

    model_type = "photon"
    keys_to_ignore_at_inference = ["past_key_values"]
    # There is no model without layers: older releases of transformers, which compare with defaults, are told not to.
    has_no_defaults_at_init = True

    def __init__(
        self,
        base_config: dict[str, Any] | None = None,
        levels: list[dict[str, Any]] | None = None,
        layout: str = "stream",
        conditioning: str = "memory",
        window: int = 64,
        num_sinks: int = 0,
        branch_layer: int = 0,
        memory_layers: list[int] | None = None,
        memory_levels: list[int] | None = None,
        memory_pooling: str = "mean",
        memory_sources: list[int] | None = None,
        memory_latent_parts: int = 1,
        full_attention_layers: list[int] | None = None,
        summary: str = "state",
        unit_positions: str = "index",
        consistency_weight: float = 0.0,
        preset: str | None = None,
        **kwargs: Any,
    ) -> None:
        self.base_config = dict(base_config or {"model_type": "llama"})
        self.levels = [{**LEVEL_DEFAULTS, **level} for level in (levels or [{"decoder_layers": 1}])]
        self.layout = layout
        self.conditioning = conditioning
        self.window = window
        self.num_sinks = num_sinks
        self.branch_layer = branch_layer
        self.memory_layers = list(memory_layers or [])
        self.memory_levels = list(memory_levels or [len(self.levels)] * len(self.memory_layers))
        self.memory_pooling = memory_pooling
        self.memory_sources = list(memory_sources or self.memory_layers)
        self.memory_latent_parts = memory_latent_parts
        self.full_attention_layers = list(full_attention_layers or [])
        self.summary = summary
        self.unit_positions = unit_positions
        self.consistency_weight = consistency_weight
        self.preset = preset
        self._check()
        base = self.family_config()
        # What generate, Trainer, peft and serving code read from any causal LM's configuration.
        self.vocab_size = base.vocab_size
        self.hidden_size = base.hidden_size
        self.num_attention_heads = base.num_attention_heads
        self.num_key_value_heads = base.num_key_value_heads
        self.head_dim = getattr(base, "head_dim", None) or base.hidden_size // base.num_attention_heads
        self.max_position_embeddings = base.max_position_embeddings
        self.initializer_range = base.initializer_range
        self.num_hidden_layers = self.num_layers
        for token in ("bos_token_id", "eos_token_id", "pad_token_id"):
            kwargs.setdefault(token, getattr(base, token, None))
        kwargs.setdefault("tie_word_embeddings", base.tie_word_embeddings)
        for derived in (
            "vocab_size",
            "hidden_size",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "max_position_embeddings",
            "initializer_range",
            "num_hidden_layers",
        ):
            kwargs.pop(derived, None)
        super().__init__(**kwargs)

    def family_config(self) -> PretrainedConfig:
        """The dense family's configuration object, with tensors of this config's hidden size."""
        settings = dict(self.base_config)
        return AutoConfig.for_model(settings.pop("model_type"), **settings)

    @property
    def num_levels(self) -> int:
        """L, the levels above the tokens."""
        return len(self.levels)

    def span(self, level: int) -> int:
        """S_l = C_1 ... C_l, the tokens under one level-`level` unit; ``span(0)`` is 1."""
        return math.prod(entry["chunk_size"] for entry in self.levels[:level])

    @property
    def top_span(self) -> int:
        """S_L, the tokens of one meta-context."""
        return self.span(self.num_levels)

    @property
    def num_token_layers(self) -> int:
        """Depth of the token decoder."""
        return self.levels[0]["decoder_layers"]

    @property
    def num_layers(self) -> int:
        """Decoder layers of all stacks together."""
        return sum(entry["encoder_layers"] + entry["decoder_layers"] for entry in self.levels)

    @property
    def window_alignment(self) -> int:
        """Tokens to whose multiples a stream window's start is moved back (1: not moved)."""
        return self.top_span if self.memory_layers else 1

    @property
    def uses_slots(self) -> bool:
        """Whether slot vectors are positions of the token decoder's sequence."""
        return self.layout == "block" or self.conditioning == "slots"

    def memory_level_of(self, layer: int) -> int | None:
        """The level whose units token-decoder layer `layer` attends to, or None."""
        return dict(zip(self.memory_layers, self.memory_levels, strict=True)).get(layer)

    @property
    def source_of_layer(self) -> dict[int, int]:
        """Memory layers -> the memory layer whose unit entries each reads."""
        return dict(zip(self.memory_layers, self.memory_sources, strict=True))

    @property
    def source_levels(self) -> dict[int, int]:
        """Layers that store unit entries -> the level of the units."""
        return {layer: self.memory_level_of(layer) for layer in dict.fromkeys(self.memory_sources)}

    def _check(self) -> None:
        def need(condition: bool, message: str) -> None:
            if not condition:
                raise ValueError(message)

        for key, value, allowed in (
            ("layout", self.layout, LAYOUTS),
            ("conditioning", self.conditioning, CONDITIONINGS),
            ("summary", self.summary, SUMMARIES),
            ("memory_pooling", self.memory_pooling, MEMORY_POOLINGS),
            ("unit_positions", self.unit_positions, UNIT_POSITIONS),
        ):
            need(value in allowed, f"{key}={value!r} is not one of {', '.join(allowed)}")
        need("model_type" in self.base_config, "base_config has no `model_type`: give the dense family's config")
        for index, level in enumerate(self.levels):
            name = f"levels.{index}"
            unknown = sorted(set(level) - set(LEVEL_DEFAULTS))
            need(not unknown, f"{name} has unknown keys {unknown}; known: {sorted(LEVEL_DEFAULTS)}")
            for key in ("chunk_size", "num_slots", "encoder_layers", "decoder_layers"):
                need(isinstance(level[key], int), f"{name}.{key} must be an integer, not {level[key]!r}")
            need(level["chunk_size"] >= 1, f"{name}.chunk_size must be at least 1")
            need(level["num_slots"] >= 1, f"{name}.num_slots must be at least 1")
            need(level["encoder_layers"] >= 0, f"{name}.encoder_layers must not be negative")
            window = level["encoder_window"]
            need(window is None or window >= 1, f"{name}.encoder_window must be at least 1, or null for unbounded")
        need(self.top_span >= 2, "the levels' chunk sizes must multiply to at least 2")
        need(self.num_token_layers >= 1, "levels.0.decoder_layers (the token decoder) must be at least 1")
        if self.layout == "block":
            self._check_block(need)
        else:
            self._check_stream(need)

    def _check_block(self, need: Any) -> None:
        need(self.conditioning == "slots", "layout=block conditions by slots: set conditioning=slots")
        need(self.branch_layer == 0, "layout=block reads the embeddings: set branch_layer=0")
        need(not self.full_attention_layers, "layout=block has no full_attention_layers: use layout=stream")
        need(not self.memory_layers, "layout=block has no memory_layers: use layout=stream")
        need(self.num_sinks == 0, "layout=block has no sinks: set num_sinks=0")
        for index, level in enumerate(self.levels):
            need(
                level["decoder_layers"] >= 1,
                f"levels.{index}.decoder_layers must be at least 1 with layout=block",
            )

    def _check_stream(self, need: Any) -> None:
        layers = self.num_token_layers
        need(
            self.window >= self.top_span,
            f"window={self.window} does not reach back over the open unit: it must be at least "
            f"the tokens under one top unit ({self.top_span}); raise window or lower a chunk_size",
        )
        need(self.num_sinks >= 0, "num_sinks must not be negative")
        need(0 <= self.branch_layer < layers, f"branch_layer must be in 0...{layers - 1}")
        need(
            self.branch_layer == 0 or self.conditioning != "slots",
            "conditioning=slots needs branch_layer=0: slots are positions of the whole token decoder",
        )
        for key in ("memory_layers", "full_attention_layers"):
            for layer in getattr(self, key):
                need(0 <= layer < layers, f"{key} names layer {layer}; the token decoder has layers 0...{layers - 1}")
            need(len(set(getattr(self, key))) == len(getattr(self, key)), f"{key} names a layer twice")
        if self.conditioning == "memory":
            need(bool(self.memory_layers), "conditioning=memory needs at least one layer in memory_layers")
            need(
                len(self.memory_levels) == len(self.memory_layers),
                "memory_levels must give one level for each of memory_layers",
            )
            for level in self.memory_levels:
                need(1 <= level <= self.num_levels, f"memory_levels names level {level} of 1...{self.num_levels}")
            need(
                max(self.memory_levels) == self.num_levels,
                f"no memory layer attends to the top level ({self.num_levels}): its encoder would be unused; "
                "lower num_levels or raise a memory level",
            )
            self._check_sources(need)
            both = sorted(set(self.memory_layers) & set(self.full_attention_layers))
            need(not both, f"layers {both} are in memory_layers and full_attention_layers: keep one")
            need(
                min(self.memory_layers) >= self.branch_layer,
                "memory_layers must not lie below branch_layer: units are read there",
            )
            for index, level in enumerate(self.levels):
                need(
                    index == 0 or level["decoder_layers"] == 0,
                    f"levels.{index}.decoder_layers must be 0 with conditioning=memory",
                )
        else:
            need(not self.memory_layers, "memory_layers needs conditioning=memory")
            for index, level in enumerate(self.levels):
                slots, chunk = level["num_slots"], level["chunk_size"]
                distributes = (index == 0 and self.conditioning == "residual") or (
                    index > 0 and level["decoder_layers"] == 0
                )
                need(
                    not distributes or slots in (1, chunk),
                    f"levels.{index}.num_slots must be 1 or chunk_size ({chunk}): each slot goes to one child",
                )

    def _check_sources(self, need: Any) -> None:
        need(
            len(self.memory_sources) == len(self.memory_layers),
            "memory_sources must give one memory layer for each of memory_layers",
        )
        need(self.memory_latent_parts in (1, 2), f"memory_latent_parts={self.memory_latent_parts} must be 1 or 2")
        if self.memory_pooling != "latent":
            need(self.memory_sources == self.memory_layers, "memory_sources needs memory_pooling=latent")
        for layer, source in zip(self.memory_layers, self.memory_sources, strict=True):
            fits = source in self.memory_layers and source <= layer and self.source_of_layer[source] == source
            need(
                fits and self.memory_level_of(source) == self.memory_level_of(layer),
                f"memory_sources: layer {layer} cannot read the latents of layer {source}: it must be a memory layer "
                "of the same level, not above it, that has its own",
            )
