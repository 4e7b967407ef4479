"""`PhotonForCausalLM`: a dense family's own causal LM whose attention sees a window and a memory of packed units."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.configuration_utils import GenerationMode
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import can_return_tuple
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from .attention_photon import NewElements, Segment
from .base_photon import BasePreTrainedModel, PhotonGenerationMixin
from .cache_photon import PhotonCache
from .configuration_photon import PhotonConfig
from .documents_photon import Group, in_documents
from .experts_photon import saving_conversions
from .families_photon import family, has_rotation, has_sink_logits, is_interleaved, rotation_kind, softcap
from .hybrid_photon import PaddedSegment, check_padding, has_padding_after_tokens, layer_masks, run_documents
from .memory_photon import LayerMemory, initialize
from .memory_segment_photon import MemorySegment
from .rows_photon import Rows, align_rows, document_rows, has_restarts
from .segments_photon import FullSegment, WindowSegment

# Least number of tokens that a cache made for assisted generation can take back.
_ROLLBACK = 64


class PhotonPreTrainedModel(BasePreTrainedModel):
    """What a PHOTON model is beside its family's: its configuration, and the initialisation of its memory."""

    config_class = PhotonConfig
    cache_class = PhotonCache

    def _init_weights(self, module: nn.Module) -> None:
        if not initialize(module):
            super()._init_weights(module)

    def __reduce__(self):
        # The class of a family's instance is made at run time and has no importable name.
        return _restore, (self.config.base_model_type, type(self).__name__), self.__getstate__()


class PhotonModel(PhotonPreTrainedModel):
    """The family's decoder stack (`LlamaModel`, ...), with the signature and output of a base model of transformers.

    An instance is one of the family's base model too; ``PhotonModel(config)`` chooses it by ``config.base_model_type``.
    Weights keep the dense model's names; the memory of layer i is ``layers.i.self_attn.memory``.

    Attributes:
        backend, fused_windows: See the setters of `PhotonForCausalLM`.
    """

    backend, fused_windows = "torch", "auto"

    def __new__(cls, config: PhotonConfig | None = None, *args: Any, **kwargs: Any) -> PhotonModel:
        return super().__new__(cls if config is None else _base_model(config.base_model_type))

    def __init__(self, config: PhotonConfig) -> None:
        super().__init__(config)
        self._add_memory()
        self.post_init()

    def _add_memory(self) -> None:
        for layer in self.config.memory_layers:
            self.layers[layer].self_attn.memory = LayerMemory(self.config, layer)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: PhotonCache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        as_dense: bool = False,
        photon_segments: list[Segment] | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """States that predict each next token, after the final norm.

        Args:
            input_ids: ``[B, T]``; or `inputs_embeds`, ``[B, T, d]``.
            attention_mask: ``[B, T]`` (with a cache ``[B, cached + T]``), 1 for tokens. Each row counts positions,
                units and its window from its own first token; what lies between tokens is left out.
            position_ids: As every row counts them, up to a constant; they follow from `attention_mask`. Where they
                start again at 0, as transformers and TRL write packed batches, another document starts, which is
                computed as if it were alone.
            past_key_values: Cache to go on from (filled in place).
            use_cache: Return a cache; default: ``config.use_cache``, or in training only if one is given.
            as_dense: Run the dense function, full attention without the memory: the teacher of distillation.
            photon_segments: What each layer attends to, in place of what the configuration says.
            **kwargs: `output_hidden_states` and what the family takes.

        Raises:
            ValueError: for no tokens, a row without any, a mask that is not 2-D, other position_ids, a cache of another
                kind, `output_attentions`, `output_router_logits`, `as_dense` or packed documents with a cache, and for
                padding that recurrent layers would read into one.
        """
        if kwargs.get("output_attentions"):
            raise ValueError("PHOTON never holds attention weights: leave output_attentions out")
        if kwargs.get("output_router_logits"):
            raise ValueError("PHOTON gives no router logits: leave output_router_logits out")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        embeds = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache is None and past_key_values is None and position_ids is not None:
            use_cache = False if has_restarts(position_ids, attention_mask) else None
        is_hybrid = bool(self.config.recurrent_layers)
        if use_cache is None and past_key_values is None and is_hybrid and has_padding_after_tokens(attention_mask):
            use_cache = False
        cache = self._choose_cache(past_key_values, False if as_dense else use_cache)
        if as_dense and cache is not None:
            raise ValueError("as_dense is for whole sequences: leave past_key_values out")
        if cache is not None and not cache.is_initialized:
            config = self.config
            cache.allocate(len(embeds), config.num_key_value_heads, config.head_dim, self._cache_like(embeds))
        rows = align_rows(attention_mask, position_ids, embeds, cache)
        run = functools.partial(self._run, cache=cache, **kwargs)
        starts_padded = is_hybrid and cache is not None and rows.order is not None
        if is_hybrid and cache is not None:
            check_padding(self.config, attention_mask, rows)

        def alone(group: Group) -> list[Segment]:
            return self._segments(document_rows(group), None, as_dense)

        if rows.documents is None or photon_segments is not None:
            segments = photon_segments or self._segments(rows, cache, as_dense)
            out = run(embeds if starts_padded else rows.gather(embeds), rows, segments, starts_padded=starts_padded)
        elif is_hybrid:
            out = run_documents(
                rows.documents, rows.gather(embeds), lambda part, group: run(part, document_rows(group), alone(group))
            )
        else:
            out = run(rows.gather(embeds), rows, in_documents(rows.documents, alone))
        if cache is not None:
            cache.advance(rows.columns, rows.lengths, rows.host_lengths)
        out.past_key_values = cache
        return out if starts_padded else rows.scatter(out)

    def _run(
        self,
        embeds: torch.Tensor,
        rows: Rows,
        segments: list[Segment],
        cache: PhotonCache | None,
        starts_padded: bool = False,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """The family's stack on ``embeds [B, T, d]`` by row, or with `starts_padded` as the input has them."""
        index = rows.index
        if starts_padded:
            index = index.expand(rows.batch, -1).gather(1, rows.place)
            segments = [PaddedSegment(segment, rows.order, rows.place) for segment in segments]
        if self.config.recurrent_layers:
            kwargs["attention_mask"] = layer_masks(self.config, rows if starts_padded else None)
        return super().forward(
            inputs_embeds=embeds,
            position_ids=index,
            past_key_values=cache,
            use_cache=cache is not None,
            return_dict=True,
            photon_segments=segments,
            **kwargs,
        )

    def _segments(self, rows: Rows, cache: PhotonCache | None, as_dense: bool) -> list[Segment | None]:
        """One segment per layer; layers of a kind share theirs, and recurrent ones have none."""
        config, made = self.config, {}
        new = NewElements(
            rows.batch, rows.index, rows.base, rows.valid, rows.rows, rows.has_past, self.backend, rows.varies
        )

        def full() -> Segment:
            return FullSegment(new, None if cache is None else cache.full, rows.longest)

        def local(own: int) -> Segment:
            ring = None if cache is None else cache.local[own]
            return WindowSegment(new, rows.index - own + 1, own - 1, ring=ring, fused=self.fused_windows)

        def windowed(memory_of: int | None) -> Segment:
            settings = {
                "fused": self.fused_windows,
                "start": config.window_start(rows.index),
                "reach": config.window - 1 + (config.chunk_size - 1 if config.memory_cells else 0),
                "period": config.chunk_size if config.memory_cells else 1,
                "num_sinks": config.num_sinks,
                "ring": None if cache is None else cache.window,
            }
            if memory_of is None:
                return WindowSegment(new, **settings)
            return MemorySegment(
                new,
                **settings,
                chunk_size=config.chunk_size,
                units=None if cache is None else cache.units,
                packed=self._units(rows.past, rows.lengths, rows.index.shape[0]),
                host_packed=self._host_units(rows),
                rotation=functools.partial(self.rotation, layer=memory_of),
                is_interleaved=is_interleaved(config),
            )

        recurrent = config.recurrent_layers

        def segment(layer: int) -> Segment | None:
            if layer in recurrent:
                return None
            own = config.family_window(layer)
            if as_dense or not config.has_window(layer):
                kind, make = ("full", full) if own is None else (own, functools.partial(local, own))
            else:
                memory = layer in config.memory_cells
                # Layers that are rotated alike share a memory's segment.
                kind = (has_rotation(config, layer), rotation_kind(config, layer)) if memory else "window"
                make = functools.partial(windowed, layer if memory else None)
            if kind not in made:
                made[kind] = make()
            return made[kind]

        return [segment(layer) for layer in range(config.num_hidden_layers)]

    def _units(self, past: torch.Tensor, new: torch.Tensor, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Units of each row before and after a segment, ``[rows]`` each."""
        return self.config.num_units(past[:rows]), self.config.num_units((past + new)[:rows])

    def _host_units(self, rows: Rows) -> tuple[list[int], list[int]] | None:
        if rows.host_past is None:
            return None
        count = self.config.num_units
        after = [count(had + new) for had, new in zip(rows.host_past, rows.host_lengths, strict=True)]
        return [count(had) for had in rows.host_past], after

    def rotation(self, positions: torch.Tensor, layer: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine at ``positions [B or 1, E]``, ``[B or 1, E, D]`` each, without YaRN's factor on them.

        The layers' queries and keys have that factor (`attention_scaling`) already. D is what is rotated of a head:
        all, a part, or nothing. Dimensions are in the family's order (see `unrotate`).

        Args:
            layer: The layer that is asked for, where layers differ.
        """
        return rotation(self.config, self.rotary_emb, positions, layer)


def rotation(
    config: PhotonConfig, rotary: nn.Module, positions: torch.Tensor, layer: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`PhotonModel.rotation` by a rotary embedding of the family."""
    if not has_rotation(config, layer):
        return (positions.new_empty(*positions.shape, 0, dtype=torch.float32),) * 2
    like = torch.empty((), device=positions.device)  # weights may be offloaded
    if config.base_model_type == "qwen3_5_text":  # which counts time, height and width, equal in text
        positions = positions.expand(3, -1, -1)
    kind = rotation_kind(config, layer)
    cosine, sine = rotary(like, positions, *(() if kind is None else (kind,)))
    scaling = getattr(rotary, f"{kind}_attention_scaling" if kind else "attention_scaling", 1.0)
    if config.base_model_type == "glm4":  # whose attention puts them in order itself
        cosine, sine = (part.chunk(2, dim=-1)[0].repeat_interleave(2, dim=-1) for part in (cosine, sine))
    if config.base_model_type == "gpt_oss":  # whose attention takes the two halves apart
        cosine, sine = (torch.cat([part, part], dim=-1) for part in (cosine, sine))
    return cosine / scaling, sine / scaling


class PhotonForCausalLM(PhotonPreTrainedModel, PhotonGenerationMixin):
    """The family's causal LM (`LlamaForCausalLM`, ...) on a `PhotonModel`; logits i predict token i + 1.

    An instance is one of the family's causal LM too; ``PhotonForCausalLM(config)`` chooses it by
    ``config.base_model_type``. Its forward is the family's: arguments of `PhotonModel.forward` are handed on.
    """

    # The cache takes drafts back where the window allows it.
    _is_stateful = False
    # `as_dense=True` computes the dense model from the same weights.
    holds_dense_model = True
    new_module_classes = (LayerMemory,)

    def __new__(cls, config: PhotonConfig | None = None, *args: Any, **kwargs: Any) -> PhotonForCausalLM:
        return super().__new__(cls if config is None else _causal_lm(config.base_model_type))

    def __init__(self, config: PhotonConfig) -> None:
        super().__init__(config)
        # The family's class has built its own decoder stack: it becomes ours, weights and names as they are.
        self.model.__class__ = _base_model(config.base_model_type)
        self.model._add_memory()
        # What `output_hidden_states` records is listed by class, when one is built.
        _CAN_RECORD_REGISTRY[_record_key(self.model)] = self.model._can_record_outputs
        self.post_init()

    def set_backend(self, backend: str) -> None:
        if backend == "triton":
            self._refuse_softcap("backend 'triton'", "backend 'torch'")
        super().set_backend(backend)

    def set_fused_windows(self, fused: str) -> None:
        if fused == "yes":
            self._refuse_softcap("flex_attention (fused='yes')", "fused='auto' or 'no'")
            if has_sink_logits(self.config):
                raise ValueError(
                    "flex_attention (fused='yes') has no sink logits, which this "
                    f"{self.config.base_model_type} model has: use fused='auto' or 'no'"
                )
        super().set_fused_windows(fused)

    def _refuse_softcap(self, what: str, instead: str) -> None:
        if (bound := softcap(self.config)) is not None:
            raise ValueError(
                f"{what} has no bound on attention scores, and this {self.config.base_model_type} model has "
                f"attn_logit_softcapping={bound}: use {instead}"
            )

    def new_cache(self, **settings: Any) -> PhotonCache:
        """An empty cache; settings as for `PhotonCache`."""
        return PhotonCache(self.config, **settings)

    def prepare_inputs_for_generation(
        self, input_ids, past_key_values=None, inputs_embeds=None, as_dense: bool = False, **kwargs: Any
    ) -> dict[str, Any]:
        # generate() takes embeddings and `as_dense` only where this signature names them.
        inputs = super().prepare_inputs_for_generation(
            input_ids, past_key_values=past_key_values, inputs_embeds=inputs_embeds, **kwargs
        )
        return inputs | {"as_dense": True} if as_dense else inputs

    def _cache_for_generation(self, generation_config: GenerationConfig, generation_mode: Any) -> PhotonCache:
        # The model and its assistant both take drafts back.
        assisted = generation_mode == GenerationMode.ASSISTED_GENERATION
        assisted = assisted or getattr(generation_config, "is_assistant", False)
        drafts = (generation_config.num_assistant_tokens, generation_config.prompt_lookup_num_tokens, _ROLLBACK)
        return self.new_cache(rollback=max(count or 0 for count in drafts) if assisted else 0)


def _record_key(model: PreTrainedModel) -> Any:
    """How transformers lists a class there: as an instance, or in releases before 5.23 by name."""
    return str(model.__class__) if type(_CAN_RECORD_REGISTRY) is dict else model


def _restore(model_type: str, ours: str) -> PreTrainedModel:
    made = {"PhotonModel": _base_model, "PhotonForCausalLM": _causal_lm}[ours](model_type)
    return made.__new__(made)


def _of_family(name: str, model_type: str, ours: type, theirs: type) -> type:
    members = {"__init__": ours.__init__, "__module__": __name__, "__qualname__": f"{name}[{model_type}]"}
    members["_weight_conversions"] = saving_conversions(model_type)
    # transformers finds a class that was saved by its name, and what it records of outputs by its qualified name.
    return type(name, (ours, theirs), members)


@functools.cache
def _base_model(model_type: str) -> type[PhotonModel]:
    return _of_family("PhotonModel", model_type, PhotonModel, family(model_type).base_model)


@functools.cache
def _causal_lm(model_type: str) -> type[PhotonForCausalLM]:
    return _of_family("PhotonForCausalLM", model_type, PhotonForCausalLM, family(model_type).causal_lm)
