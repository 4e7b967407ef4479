"""PHOTON (arXiv 2512.20687): token chunks summarised bottom-up, decoded top-down with a bounded span."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from .attention_photon import FUSED, BandSpan, FullSpan, KeyValue, MemorySpan, Span
from .cache_photon import PhotonCache, StreamGeometry
from .configuration_photon import PhotonConfig
from .decoding_photon import BACKENDS, PROTOCOLS, TokenStepper, Trace, fill_cache, load_kernels
from .families_photon import family_classes
from .hierarchy_photon import (
    Chunker,
    Converter,
    InputScale,
    PhotonLevel,
    StartState,
    UnitMemory,
    initialize,
    stack_config,
)
from .latent_photon import LatentChunker, LatentConverter, LatentSpan


@dataclass
class PhotonCausalLMOutput(CausalLMOutputWithPast):
    """`CausalLMOutputWithPast` and the recursive-consistency term.

    Attributes:
        consistency_loss: Mean of 1 - cos(decoder's prediction of a unit, encoder's state of it) over levels >= 2;
            None where no level has both.
    """

    consistency_loss: torch.FloatTensor | None = None


class PhotonPreTrainedModel(PreTrainedModel):
    """Weight initialisation and what transformers needs to know of every PHOTON model."""

    config_class = PhotonConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    # What layers see of the sequence is laid out once, for all of them, on one device.
    _no_split_modules = ["PhotonModel"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True

    def _init_weights(self, module: nn.Module) -> None:
        if not initialize(module, self.config.initializer_range):
            super()._init_weights(module)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """As in transformers; the dense family's configuration, which sets the size at loading, is changed too."""
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        self.config.base_config["vocab_size"] = self.config.vocab_size
        return embeddings


class PhotonModel(PhotonPreTrainedModel):
    """The hierarchy: from token embeddings to the states that predict each next token.

    Paper section 2: context chunkers and encoders bottom-up, context converters and decoders top-down. The top level
    is shifted by one unit (a learned start state conditions the first); levels below are not (DESIGN 3.2).
    """

    def __init__(self, config: PhotonConfig) -> None:
        super().__init__(config)
        base = stack_config(config)
        family = family_classes(base.model_type)
        self.embed_tokens = nn.Embedding(base.vocab_size, base.hidden_size)
        self.levels = nn.ModuleList(PhotonLevel(config, base, index) for index in range(config.num_levels))
        self.start = StartState(base.hidden_size) if config.conditioning != "memory" else None
        self.norm = family.norm(base.hidden_size, eps=base.rms_norm_eps)
        self.rotary_emb = family.rotary(config=base)
        self.fused_bands = "auto"
        self.apply_rotary = family.apply_rotary
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embed_tokens = value

    def unit_positions(self, level: int, unit: torch.Tensor) -> torch.Tensor:
        """Rotary positions of units of ``levels[level]``: the index, or the index times the span."""
        return unit * self.config.span(level + 1) if self.config.unit_positions == "scaled" else unit

    def forward(
        self,
        embeds: torch.Tensor,
        lengths: torch.Tensor | None = None,
        window: int | None = None,
        trace: Trace | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Teacher-forced pass over whole sequences.

        Args:
            embeds: Token embeddings, ``[B, T, d]``; every row starts at column 0.
            lengths: Tokens of each row, ``[B]``; None: T. Only the consistency term needs it.
            window: Overrides ``config.window`` (window annealing in training).
            trace: If given, receives what a cache is filled from.

        Returns:
            States ``[B, T, d]``, where row i predicts token i + 1 (before the final norm), and the consistency term.
        """
        length = embeds.shape[1]
        # The hierarchy is run to the end of the open meta-context and the padding dropped: exact by causality.
        total = (length // self.config.top_span + 1) * self.config.top_span
        padded = F.pad(embeds, (0, 0, 0, total - length))
        stream = self.config.layout == "stream"
        branch = self._lower_layers(padded, window, trace) if stream and self.config.branch_layer else padded
        inputs, summaries, states = self._ascend(branch, trace)
        if self.config.conditioning == "memory":
            return self._memory_stream(branch[:, :length], states, window, trace), None
        top = states[-1] - summaries[-1] if self.config.summary == "change" else states[-1]
        slots, consistency = self._descend(top, inputs, lengths, length, trace)
        if not stream:
            out = self._isolated(0, slots, padded, trace)
            return out[:, 1 : length + 1], consistency
        if self.config.conditioning == "slots":
            return self._slot_stream(padded, slots, window, trace)[:, :length], consistency
        return self._residual_stream(branch, slots, length, window, trace), consistency

    def dense_forward(self, embeds: torch.Tensor) -> torch.Tensor:
        """The dense function: the token decoder at full attention without the hierarchy, ``[B, T, d] -> [B, T, d]``."""
        decoder = self.levels[0].decoder
        return decoder(embeds, self._rotary(embeds), [FullSpan()] * len(decoder.layers))

    def _rotary(self, hidden: torch.Tensor, positions: torch.Tensor | None = None):
        if positions is None:
            positions = torch.arange(hidden.shape[1], device=hidden.device)
        return self.rotary_emb(hidden, positions[None])

    # --- bottom-up ---

    def _ascend(self, states: torch.Tensor, trace: Trace | None):
        """Per level: what its chunker read, its encoder's input and its encoder's output."""
        inputs, summaries, outputs = [], [], []
        for index, level in enumerate(self.levels):
            inputs.append(states)
            chunks = states.unflatten(1, (-1, self.config.levels[index]["chunk_size"]))
            summary = level.chunker(chunks)
            states = self._encode(index, summary, trace)
            summaries.append(summary)
            outputs.append(states)
        if trace is not None:
            trace.inputs = inputs
        return inputs, summaries, outputs

    def _encode(self, index: int, summary: torch.Tensor, trace: Trace | None) -> torch.Tensor:
        encoder, window = self.levels[index].encoder, self.config.levels[index]["encoder_window"]
        unit = torch.arange(summary.shape[1], device=summary.device)
        recorded = None if trace is None else trace.encoders[index]
        span = FullSpan(recorded) if window is None else BandSpan(unit, window, window, recorded=recorded)
        rotary = self._rotary(summary, self.unit_positions(index, unit))
        return encoder(summary, rotary, [span] * len(encoder.layers))

    # --- top-down ---

    def _descend(self, top, inputs, lengths, length, trace):
        """Slots of every level-1 chunk, ``[B, chunks, R, d]``, and the consistency term."""
        batch = top.shape[0]
        condition = torch.cat([self.start(batch).to(top.dtype), top[:, :-1]], dim=1)
        terms = []
        for index in reversed(range(self.config.num_levels)):
            level = self.config.levels[index]
            slots = self.levels[index].converter(condition)
            if trace is not None:
                trace.slots[index], trace.conditions[index] = slots, condition
            if index == 0:
                break
            if self.levels[index].decoder is None:
                repeats = level["chunk_size"] // level["num_slots"]
                condition = slots.repeat_interleave(repeats, dim=2).flatten(1, 2)
                continue
            condition = self._isolated(index, slots, inputs[index], trace)
            counts = lengths if lengths is not None else torch.full((batch,), length, device=top.device)
            terms.append(_consistency(condition, inputs[index], counts // self.config.span(index)))
        return slots, torch.stack(terms).mean() if terms else None

    def _isolated(self, index: int, slots: torch.Tensor, units: torch.Tensor, trace: Trace | None) -> torch.Tensor:
        """Decode every group alone: ``slots [B, G, R, d]``, ``units [B, G * C, d]`` -> predictions ``[B, G * C, d]``.

        Position R - 1 + j has read the slots and the units before j of its group; the group's last unit is read by
        none of the predictions and left out.
        """
        decoder = self.levels[index].decoder
        groups = decoder.input_scale(units).unflatten(1, (slots.shape[1], -1))
        sequence = torch.cat([slots, groups[:, :, :-1]], dim=2).flatten(0, 1)
        span = FullSpan(None if trace is None else trace.decoders[index])
        out = decoder(sequence, self._rotary(sequence), [span] * len(decoder.layers))
        return out[:, slots.shape[2] - 1 :].unflatten(0, (slots.shape[0], -1)).flatten(1, 2)

    # --- the token stream ---

    def _spans(
        self,
        positions: torch.Tensor,
        window: int | None,
        trace: Trace | None,
        memory: dict[int, Callable[..., Span]] | None = None,
    ) -> list[Span]:
        """One span per layer of the token decoder, for elements at token `positions [E]`."""
        config, geometry = self.config, StreamGeometry.of(self.config)
        window = window or config.window
        recorded = None if trace is None else trace.decoders[0]
        index = torch.arange(positions.shape[0], device=positions.device)
        # Whole chunks per block, so that the own block and the one before always hold the aligned window.
        chunks = -(-(window + geometry.alignment - 1) // geometry.chunk_size)
        band = {
            "positions": positions,
            "window": window,
            "block": chunks * (geometry.chunk_size + geometry.num_slots),
            "alignment": geometry.alignment,
            "sinks": index[geometry.is_sink(index)] if config.num_sinks else None,
            "recorded": recorded,
            "fused": self.fused_bands,
        }
        window_span, full_span = BandSpan(**band), FullSpan(recorded)
        memory_spans = {level: make(**band) for level, make in (memory or {}).items()}
        return [
            full_span
            if layer in config.full_attention_layers
            else memory_spans.get(config.memory_level_of(layer), window_span)
            for layer in range(config.num_token_layers)
        ]

    def _lower_layers(self, embeds: torch.Tensor, window: int | None, trace: Trace | None) -> torch.Tensor:
        """The token decoder's layers below the point where the hierarchy reads and writes."""
        decoder = self.levels[0].decoder
        hidden = decoder.input_scale(embeds)
        spans = self._spans(torch.arange(hidden.shape[1], device=hidden.device), window, trace)
        return decoder(hidden, self._rotary(hidden), spans, stop=self.config.branch_layer)

    def _upper_layers(self, hidden, window, trace, memory=None) -> torch.Tensor:
        spans = self._spans(torch.arange(hidden.shape[1], device=hidden.device), window, trace, memory)
        return self.levels[0].decoder(hidden, self._rotary(hidden), spans, start=self.config.branch_layer)

    def _stream_input(self, branch: torch.Tensor) -> torch.Tensor:
        return branch if self.config.branch_layer else self.levels[0].decoder.input_scale(branch)

    def _residual_stream(self, branch, slots, length, window, trace) -> torch.Tensor:
        repeats = self.config.levels[0]["chunk_size"] // slots.shape[2]
        added = slots.repeat_interleave(repeats, dim=2).flatten(1, 2)
        hidden = self._stream_input(branch[:, :length]) + added[:, :length]
        return self._upper_layers(hidden, window, trace)

    def _memory_stream(self, branch, states, window, trace) -> torch.Tensor:
        config, token, memory = self.config, torch.arange(branch.shape[1], device=branch.device)[None], {}
        for level in set(config.memory_levels):
            pool = partial(self.pool_units, states=states[level - 1], position=token)
            settings = {"unit_span": config.span(level), "recorded_units": None if trace is None else trace.units}
            if config.memory_pooling == "latent":
                access = {"pack": pool, "unpack": self.unpack_units, "sources": config.source_of_layer}
                access["turn_back"] = partial(self.turn_back, position=token)
                memory[level] = partial(LatentSpan, **access, **settings)
            else:
                memory[level] = partial(MemorySpan, pool=pool, **settings)
        return self._upper_layers(self._stream_input(branch), window, trace, memory)

    def pool_units(
        self, layer: int, key: torch.Tensor, value: torch.Tensor, states: torch.Tensor, position: torch.Tensor
    ) -> KeyValue:
        """What memory layer `layer` stores of complete units.

        Args:
            layer: A layer of `config.memory_sources`.
            key, value: Its own, rotated, ``[B, Hkv, E, D]``; the first token is a unit's first, an open unit at the
                end is left out.
            states: Encoder states of at least ``E // S`` units, ``[B, U, d]``.
            position: Tokens' positions, ``[B or 1, E]``.

        Returns:
            Unit keys and values (or the halves of latents), ``[B, Hkv, E // S, D]``.
        """
        decoder, span = self.levels[0].decoder, self.config.span(self.config.memory_level_of(layer))
        count = key.shape[2] // span
        key, value, position = key[:, :, : count * span], value[:, :, : count * span], position[:, : count * span]
        latent = self.config.memory_pooling == "latent"
        if latent:
            key = self.turn_back(key, position)
        grouped = [tensor.unflatten(2, (count, span)) for tensor in (key, value)]
        if latent:
            return decoder.latent[str(layer)](*grouped, states[:, :count])
        rotary = self.rotary_emb(key, position[:, span - 1 :: span])
        excluded = (position < self.config.num_sinks).unflatten(1, (count, span))
        return decoder.memory[str(layer)](*grouped, states[:, :count], rotary, excluded)

    def unpack_units(self, layer: int, latents: KeyValue) -> KeyValue:
        """Keys and values of the tokens under units, as memory layer `layer` reads them (`latent_photon`)."""
        return self.levels[0].decoder.memory[str(layer)](*latents)

    def turn_back(self, states: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """Undo the rotation of queries or keys ``[B, H, E, D]`` at ``position [B or 1, E]``; norms stay."""
        cosine, sine = self.rotation(states, position)
        return self.apply_rotary(states, states, cosine, -sine)[0]

    def rotation(self, like: torch.Tensor, position: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine at ``position [B or 1, E]``, ``[B or 1, E, D]`` each, without YaRN's factor on them.

        The layers' queries and keys have that factor (`attention_scaling`) already.
        """
        return tuple(part / self.rotary_emb.attention_scaling for part in self.rotary_emb(like, position))

    def _slot_stream(self, embeds, slots, window, trace) -> torch.Tensor:
        decoder, count = self.levels[0].decoder, slots.shape[2]
        chunk = self.config.levels[0]["chunk_size"]
        chunks = decoder.input_scale(embeds).unflatten(1, (-1, chunk))
        sequence = torch.cat([slots, chunks], dim=2).flatten(1, 2)
        first = torch.arange(0, embeds.shape[1], chunk, device=embeds.device)[:, None]
        inside = torch.arange(chunk, device=embeds.device)
        positions = torch.cat([first.expand(-1, count), first + inside], dim=1).flatten()
        spans = self._spans(positions, window, trace)
        out = decoder(sequence, self._rotary(sequence, positions), spans)
        return out.unflatten(1, (-1, count + chunk))[:, :, count:].flatten(1, 2)


def _consistency(predicted: torch.Tensor, states: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Mean of 1 - cos over the first ``counts[b]`` units of ``[B, U, d]`` (paper, recursive consistency)."""
    distance = 1 - F.cosine_similarity(predicted.float(), states.float(), dim=-1)
    real = torch.arange(states.shape[1], device=states.device) < counts[:, None]
    return (distance * real).sum() / real.sum().clamp(min=1)


class PhotonForCausalLM(PhotonPreTrainedModel, GenerationMixin):
    """PHOTON with a language-model head; position i of the logits predicts token i + 1.

    Works with `generate` (greedy, sampling, beams), Trainer and peft like any causal LM of transformers. Any length
    is accepted. Padding may be on the left or the right: chunks count from each row's own first token.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    # Assisted decoding would have to take summaries apart: transformers then refuses it with a clear message.
    _is_stateful = True

    def __init__(self, config: PhotonConfig) -> None:
        super().__init__(config)
        self.model = PhotonModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.backend, self.protocol = "torch", "hiergen"
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.lm_head = value

    def new_module_names(self) -> list[str]:
        """Names of the modules that a conversion adds, for peft's `modules_to_save`."""
        new = (Chunker, Converter, StartState, InputScale, UnitMemory, LatentChunker, LatentConverter)
        return [name for name, module in self.named_modules() if isinstance(module, new)]

    def supports_dense_forward(self) -> bool:
        """Whether the token decoder holds every dense layer in order, so that ``as_dense=True`` is the dense model."""
        dense_layers = self.config.base_config.get("num_hidden_layers")
        return self.config.layout == "stream" and self.config.num_token_layers == dense_layers

    def set_backend(self, backend: str) -> None:
        """Choose how cached decoding computes attention and chunkers: ``torch`` or ``triton``.

        Raises:
            ValueError: for another name.
            ImportError: if ``triton`` is asked for and the kernels are not installed.
        """
        if backend not in BACKENDS:
            raise ValueError(f"backend {backend!r} is not one of {', '.join(BACKENDS)}")
        if backend == "triton":
            load_kernels()
        self.backend = backend

    def set_protocol(self, protocol: str) -> None:
        """Choose what a cached decoding feeds upward: `hiergen` (default) or `recgen` (paper, definition A.3).

        `hiergen` encodes the tokens that were emitted and equals the training forward. `recgen` takes the decoders'
        reconstructions in the place of the encoders' states below the top, so that no lower encoder runs and only the
        top encoder's cache grows. It is here to reproduce the paper and does not compute the same function: with
        isolated chunks, which tokens are emitted has no influence on any later meta-context; with a stream, only
        through the window. A model whose lower encoders have a window (the default) has the same growing cache
        with `hiergen`. The prompt is encoded in full by either.

        Raises:
            ValueError: for another name, and for `recgen` on a model that reconstructs nothing: one level, `memory`,
                or a level above the first without decoder layers.
        """
        if protocol not in PROTOCOLS:
            raise ValueError(f"protocol {protocol!r} is not one of {', '.join(PROTOCOLS)}")
        levels = self.config.levels
        reconstructs = len(levels) > 1 and all(level["decoder_layers"] for level in levels[1:])
        if protocol == "recgen" and (self.config.conditioning == "memory" or not reconstructs):
            raise ValueError(
                "protocol 'recgen' needs at least two levels, with decoder_layers in every level above the first, and "
                "conditioning slots or residual: use 'hiergen', or a model of the preset paper"
            )
        self.protocol = protocol

    def set_fused_bands(self, fused: str) -> None:
        """Choose how windowed layers attend over whole sequences: ``auto``, ``yes`` (flex_attention) or ``no`` (SDPA).

        Raises:
            ValueError: for another name.
        """
        if fused not in FUSED:
            raise ValueError(f"fused={fused!r} is not one of {', '.join(FUSED)}")
        self.model.fused_bands = fused

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        past_key_values: PhotonCache | None = None,
        use_cache: bool | None = None,
        inputs_embeds: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        as_dense: bool = False,
        window: int | None = None,
        **kwargs: Any,
    ) -> PhotonCausalLMOutput:
        """Logits, and the loss if `labels` are given.

        Args:
            input_ids: ``[B, T]``; or `inputs_embeds`, ``[B, T, d]``.
            attention_mask: ``[B, T]`` (with a cache: ``[B, cached + T]``), 1 for tokens; each row's tokens adjoin.
            labels: ``[B, T]``, -100 ignored; shifted inside.
            past_key_values: Cache to go on from (filled in place).
            use_cache: Return a cache; default: only if one is given.
            logits_to_keep: Last columns (or their indices) to compute logits for; 0: all.
            as_dense: Run the dense function (see `supports_dense_forward`): the teacher of distillation.
            window: Overrides the config's window in this pass (window annealing).

        Raises:
            ValueError: for position_ids (rows count from their own first token), a mask with holes or an empty
                row, a cache of another kind, `as_dense` or `window` with a cache, and `as_dense` on a model that does
                not hold the dense layers in order.
        """
        if kwargs.pop("position_ids", None) is not None:
            raise ValueError("PHOTON derives positions from attention_mask: leave position_ids out")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        embeds = self.model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        cache = past_key_values
        if cache is None and use_cache:
            cache = PhotonCache(self.config, self.protocol)
        if cache is not None:
            if not isinstance(cache, PhotonCache):
                raise ValueError(f"past_key_values must be a PhotonCache, not {type(cache).__name__}: leave it out")
            if as_dense or window is not None:
                raise ValueError("as_dense and window are for whole sequences, without a cache: set use_cache=False")
        consistency = None
        if cache is not None and not cache.is_empty:
            hidden = self._decode(embeds, attention_mask, cache)
        else:
            hidden, consistency = self._whole(embeds, attention_mask, cache, as_dense, window)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(self.model.norm(hidden[:, keep]))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
            if self.training and consistency is not None and self.config.consistency_weight:
                loss = loss + self.config.consistency_weight * consistency
        return PhotonCausalLMOutput(loss=loss, logits=logits, past_key_values=cache, consistency_loss=consistency)

    def _whole(self, embeds, attention_mask, cache, as_dense, window):
        batch, columns = embeds.shape[:2]
        lengths, shift = _row_extent(attention_mask, batch, columns, embeds.device)
        column = torch.arange(columns, device=embeds.device)
        if shift is not None:
            aligned = (column + shift[:, None]).clamp(max=columns - 1)
            embeds = embeds.gather(1, aligned[:, :, None].expand_as(embeds))
        consistency = None
        if as_dense:
            if not self.supports_dense_forward():
                raise ValueError("as_dense=True needs a model that keeps every dense layer in order (preset graft)")
            hidden = self.model.dense_forward(embeds)
        else:
            trace = Trace.empty(self.config.num_levels) if cache is not None else None
            hidden, consistency = self.model(embeds, lengths, window, trace)
            if cache is not None:
                fill_cache(cache, trace, lengths)
                cache.columns = columns
        if shift is not None:
            source = (column - shift[:, None]).clamp(min=0)
            hidden = hidden.gather(1, source[:, :, None].expand_as(hidden))
        return hidden, consistency

    def _decode(self, embeds, attention_mask, cache: PhotonCache) -> torch.Tensor:
        batch, columns = embeds.shape[:2]
        real = torch.ones(batch, columns, dtype=torch.bool, device=embeds.device)
        if attention_mask is not None:
            real = attention_mask[:, -columns:].bool()
        hidden = torch.zeros_like(embeds)
        stepper = TokenStepper(self.model, cache, self.backend)
        for column in range(columns):
            rows = real[:, column].nonzero()[:, 0]
            if rows.numel():
                hidden[rows, column] = stepper.feed(rows, embeds[rows, column]).to(hidden.dtype)
        cache.columns += columns
        return hidden

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def prepare_inputs_for_generation(
        self, input_ids, past_key_values=None, inputs_embeds=None, use_cache=True, **kwargs
    ):
        # transformers takes embeddings for the prompt only where this signature names them.
        if use_cache and past_key_values is None:
            past_key_values = PhotonCache(self.config, self.protocol)
        return super().prepare_inputs_for_generation(
            input_ids, past_key_values=past_key_values, inputs_embeds=inputs_embeds, use_cache=use_cache, **kwargs
        )

    def generate_batch(self, *args: Any, **kwargs: Any) -> None:
        """Not supported: transformers' continuous batching does not know PHOTON's cache and would be silently wrong.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("continuous batching of transformers does not support PHOTON's cache: use generate()")

    init_continuous_batching = generate_batch


def _row_extent(mask, batch: int, columns: int, device) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Tokens per row, and how far each row starts from column 0 (None if all start there)."""
    if mask is None or bool(mask.all()):
        return torch.full((batch,), columns, device=device), None
    if mask.dim() != 2:
        raise ValueError("PHOTON takes a 2-D attention_mask [batch, length]")
    mask = mask[:, -columns:].long()
    lengths, first = mask.sum(1), mask.argmax(1)
    last = columns - 1 - mask.flip(1).argmax(1)
    if bool((lengths == 0).any()):
        raise ValueError("attention_mask has a row without tokens")
    if bool((last - first + 1 != lengths).any()):
        raise ValueError("attention_mask has holes: PHOTON takes padding on the left or the right of a row only")
    return lengths, first if bool((first > 0).any()) else None
