"""`PhotonForCausalLM`: a dense family's own causal LM whose attention sees a window and a memory of packed units."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.generation.configuration_utils import GenerationMode
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import can_return_tuple
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from .attention_photon import ATTENTION_NAME, BACKENDS, NewElements, Segment, load_kernels
from .cache_photon import PhotonCache
from .configuration_photon import PhotonConfig
from .families_photon import family
from .memory_photon import LayerMemory, initialize
from .memory_segment_photon import MemorySegment
from .rows_photon import Rows, align_rows
from .segments_photon import FUSED, FullSegment, WindowSegment

# Least number of tokens that a cache made for assisted generation can take back.
_ROLLBACK = 64


class PhotonPreTrainedModel(PreTrainedModel):
    """What a PHOTON model is beside its family's: its configuration, and the initialisation of its memory."""

    config_class = PhotonConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = False
    _can_compile_fullgraph = False

    def _init_weights(self, module: nn.Module) -> None:
        if not initialize(module):
            super()._init_weights(module)

    def __reduce__(self):
        # The class of a family's instance is made at run time and has no importable name.
        return _restore, (self.config.base_model_type, type(self).__name__), self.__getstate__()

    def _check_and_adjust_attn_implementation(self, attn_implementation: str | None, *args: Any, **kwargs: Any) -> str:
        if attn_implementation not in (None, ATTENTION_NAME):
            raise ValueError(
                f"PHOTON has an attention of its own: leave attn_implementation={attn_implementation!r} out"
            )
        return ATTENTION_NAME


class PhotonModel(PhotonPreTrainedModel):
    """The family's decoder stack (`LlamaModel`, ...), with the signature and output of a base model of transformers.

    An instance is one of the family's base model too; ``PhotonModel(config)`` chooses it by ``config.base_model_type``.
    Weights keep the dense model's names; the memory of layer i is ``layers.i.self_attn.memory``.
    """

    def __new__(cls, config: PhotonConfig | None = None, *args: Any, **kwargs: Any) -> PhotonModel:
        return super().__new__(cls if config is None else _base_model(config.base_model_type))

    def __init__(self, config: PhotonConfig) -> None:
        super().__init__(config)
        self._add_memory()
        self.post_init()

    def _add_memory(self) -> None:
        for layer in self.config.memory_layers:
            self.layers[layer].self_attn.memory = LayerMemory(self.config)

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
            position_ids: Only as every row counts them, up to a constant; they follow from `attention_mask`.
            past_key_values: Cache to go on from (filled in place).
            use_cache: Return a cache; default: ``config.use_cache``, or in training only if one is given.
            as_dense: Run the dense function, full attention without the memory: the teacher of distillation.
            photon_segments: What each layer attends to, in place of what the configuration says.
            **kwargs: `output_hidden_states` and what the family takes.

        Raises:
            ValueError: for no tokens, a row without any, a mask that is not 2-D, other position_ids, a cache of another
                kind, `output_attentions`, and `as_dense` with a cache.
        """
        if kwargs.get("output_attentions"):
            raise ValueError("PHOTON never holds attention weights: leave output_attentions out")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        embeds = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        cache = self._cache(past_key_values, use_cache, as_dense)
        if cache is not None and not cache.is_initialized:
            self._allocate(cache, embeds)
        rows = align_rows(attention_mask, position_ids, embeds, cache)
        out = super().forward(
            inputs_embeds=rows.gather(embeds),
            position_ids=rows.index,
            past_key_values=cache,
            use_cache=cache is not None,
            return_dict=True,
            photon_segments=photon_segments or self._segments(rows, cache, as_dense),
            **kwargs,
        )
        if cache is not None:
            cache.advance(rows.columns, rows.lengths, rows.host_lengths)
        out.past_key_values = cache
        return rows.scatter(out)

    def _cache(self, cache: PhotonCache | None, use_cache: bool | None, as_dense: bool) -> PhotonCache | None:
        checkpoints = self.training and getattr(self, "gradient_checkpointing", False)
        if cache is None and not as_dense and not checkpoints:
            use_cache = (self.config.use_cache and not self.training) if use_cache is None else use_cache
            cache = PhotonCache(self.config) if use_cache else None
        if cache is None:
            return None
        if not isinstance(cache, PhotonCache):
            raise ValueError(f"past_key_values must be a PhotonCache, not {type(cache).__name__}: leave it out")
        if as_dense:
            raise ValueError("as_dense is for whole sequences: leave past_key_values out")
        if checkpoints:
            raise ValueError("gradient checkpointing computes layers twice and cannot fill a cache: leave it out")
        return cache

    def _allocate(self, cache: PhotonCache, embeds: torch.Tensor) -> None:
        weight = self.layers[0].self_attn.v_proj.weight
        dtype = torch.get_autocast_dtype(weight.device.type) if torch.is_autocast_enabled() else embeds.dtype
        like = embeds.new_zeros((), dtype=dtype)
        cache.allocate(embeds.shape[0], self.config.num_key_value_heads, self.config.head_dim, like)

    def _segments(self, rows: Rows, cache: PhotonCache | None, as_dense: bool) -> list[Segment]:
        """One segment per layer; layers of a kind share theirs."""
        config, made = self.config, {}
        new = NewElements(
            rows.batch, rows.index, rows.base, rows.valid, rows.rows, rows.has_past, getattr(self, "backend", "torch")
        )
        fused = getattr(self, "fused_windows", "auto")

        def full() -> Segment:
            return FullSegment(new, None if cache is None else cache.full, rows.longest)

        def local(own: int) -> Segment:
            ring = None if cache is None else cache.local[own]
            return WindowSegment(new, rows.index - own + 1, own - 1, ring=ring, fused=fused)

        def windowed(memory: bool) -> Segment:
            settings = {
                "fused": fused,
                "start": config.window_start(rows.index),
                "reach": config.window - 1 + (config.chunk_size - 1 if config.memory_layers else 0),
                "period": config.chunk_size if config.memory_layers else 1,
                "num_sinks": config.num_sinks,
                "ring": None if cache is None else cache.window,
            }
            if not memory:
                return WindowSegment(new, **settings)
            return MemorySegment(
                new,
                **settings,
                chunk_size=config.chunk_size,
                units=None if cache is None else cache.units,
                packed=self._units(rows.past, rows.lengths, rows.index.shape[0]),
                host_packed=self._host_units(rows),
                rotation=self.rotation,
            )

        def segment(layer: int) -> Segment:
            own = config.family_window(layer)
            if as_dense or not config.has_window(layer):
                kind, make = ("full", full) if own is None else (own, functools.partial(local, own))
            else:
                memory = layer in config.memory_layers
                kind, make = ("memory" if memory else "window"), functools.partial(windowed, memory)
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

    def rotation(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine at ``positions [B or 1, E]``, ``[B or 1, E, D]`` each, without YaRN's factor on them.

        The layers' queries and keys have that factor (`attention_scaling`) already.
        """
        like = torch.empty((), device=positions.device)  # weights may be offloaded
        cosine, sine = self.rotary_emb(like, positions)
        scaling = getattr(self.rotary_emb, "attention_scaling", 1.0)
        return cosine / scaling, sine / scaling


class PhotonForCausalLM(PhotonPreTrainedModel, GenerationMixin):
    """The family's causal LM (`LlamaForCausalLM`, ...) on a `PhotonModel`; logits i predict token i + 1.

    An instance is one of the family's causal LM too; ``PhotonForCausalLM(config)`` chooses it by
    ``config.base_model_type``. Its forward is the family's: arguments of `PhotonModel.forward` are handed on.
    """

    # The cache takes drafts back where the window allows it.
    _is_stateful = False
    # `as_dense=True` computes the dense model from the same weights.
    holds_dense_model = True

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

    def new_module_names(self) -> list[str]:
        """Names of the modules that a conversion adds, for peft's `modules_to_save`."""
        return [name for name, module in self.named_modules() if isinstance(module, LayerMemory)]

    @property
    def backend(self) -> str:
        """How one token per row is computed: ``torch`` or ``triton``."""
        return getattr(self.model, "backend", "torch")

    def set_backend(self, backend: str) -> None:
        """Choose how one token per row is computed: ``torch`` or ``triton``.

        Raises:
            ValueError: for another name.
            ImportError: if ``triton`` is asked for and the kernels are not installed.
        """
        if backend not in BACKENDS:
            raise ValueError(f"backend {backend!r} is not one of {', '.join(BACKENDS)}")
        if backend == "triton":
            load_kernels()
        self.model.backend = backend

    def set_fused_windows(self, fused: str) -> None:
        """Choose how training attends to windows: ``auto``, ``yes`` (flex_attention) or ``no`` (block by block).

        Raises:
            ValueError: for another name.
        """
        if fused not in FUSED:
            raise ValueError(f"fused={fused!r} is not one of {', '.join(FUSED)}")
        self.model.fused_windows = fused

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

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], generation_mode, *args: Any, **_: Any
    ) -> None:
        if generation_config.cache_implementation is not None:
            raise ValueError(
                f"cache_implementation={generation_config.cache_implementation!r}: leave it out, PHOTON has its own"
            )
        given = model_kwargs.get("past_key_values")
        if given is None and generation_config.use_cache is not False:
            # The model and its assistant both take drafts back.
            assisted = generation_mode == GenerationMode.ASSISTED_GENERATION
            assisted = assisted or getattr(generation_config, "is_assistant", False)
            drafts = (generation_config.num_assistant_tokens, generation_config.prompt_lookup_num_tokens, _ROLLBACK)
            rollback = max(count or 0 for count in drafts) if assisted else 0
            model_kwargs["past_key_values"] = self.new_cache(rollback=rollback)

    def generate_batch(self, *args: Any, **kwargs: Any) -> None:
        """Not supported: transformers' continuous batching does not know PHOTON's cache and would be silently wrong.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("continuous batching of transformers does not support PHOTON's cache: use generate()")

    init_continuous_batching = generate_batch


def _record_key(model: PreTrainedModel) -> Any:
    """How transformers lists a class there: as an instance, or in releases before 5.23 by name."""
    return str(model.__class__) if type(_CAN_RECORD_REGISTRY) is dict else model


def _restore(model_type: str, ours: str) -> PreTrainedModel:
    made = {"PhotonModel": _base_model, "PhotonForCausalLM": _causal_lm}[ours](model_type)
    return made.__new__(made)


def _of_family(name: str, model_type: str, ours: type, theirs: type) -> type:
    members = {"__init__": ours.__init__, "__module__": __name__, "__qualname__": f"{name}[{model_type}]"}
    # transformers finds a class that was saved by its name, and what it records of outputs by its qualified name.
    return type(name, (ours, theirs), members)


@functools.cache
def _base_model(model_type: str) -> type[PhotonModel]:
    return _of_family("PhotonModel", model_type, PhotonModel, family(model_type).base_model)


@functools.cache
def _causal_lm(model_type: str) -> type[PhotonForCausalLM]:
    return _of_family("PhotonForCausalLM", model_type, PhotonForCausalLM, family(model_type).causal_lm)
