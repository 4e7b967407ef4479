"""What the PHOTON models share as models of transformers, beside their attention: caches, settings and refusals."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel

from .attention_photon import ATTENTION_NAME, BACKENDS, load_kernels
from .cache_photon import RowCache
from .segments_photon import FUSED


class BasePreTrainedModel(PreTrainedModel):
    """A model with PHOTON's attention.

    Attributes:
        cache_class: Kind of its cache.
    """

    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = False
    _can_compile_fullgraph = False
    cache_class: type[RowCache]

    def _check_and_adjust_attn_implementation(self, attn_implementation: str | None, *args: Any, **kwargs: Any) -> str:
        if attn_implementation not in (None, ATTENTION_NAME):
            raise ValueError(
                f"PHOTON has an attention of its own: leave attn_implementation={attn_implementation!r} out"
            )
        return ATTENTION_NAME

    def _new_cache(self) -> RowCache:
        return self.cache_class(self.config)

    def _choose_cache(self, given: RowCache | None, use_cache: bool | None) -> RowCache | None:
        """The cache of a forward: the one that is given, or a new one where `use_cache` or the configuration asks."""
        checkpoints = self.training and getattr(self, "gradient_checkpointing", False)
        if given is None:
            use_cache = (self.config.use_cache and not self.training) if use_cache is None else use_cache
            return self._new_cache() if use_cache and not checkpoints else None
        if not isinstance(given, self.cache_class):
            raise ValueError(
                f"past_key_values must be a {self.cache_class.__name__}, not {type(given).__name__}: leave it out"
            )
        if checkpoints:
            raise ValueError("gradient checkpointing computes layers twice and cannot fill a cache: leave it out")
        return given

    @staticmethod
    def _cache_like(embeds: torch.Tensor) -> torch.Tensor:
        """A number with the type and device of the keys and values that `embeds` become."""
        device = embeds.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else embeds.dtype
        return embeds.new_zeros((), dtype=dtype)


class PhotonGenerationMixin(GenerationMixin):
    """What the causal LMs share; their base model is ``model``.

    Attributes:
        new_module_classes: Kinds of modules that a conversion adds.
    """

    new_module_classes: tuple[type[nn.Module], ...]

    def new_module_names(self) -> list[str]:
        """Names of the modules that a conversion adds, for peft's `modules_to_save`."""
        return [name for name, module in self.named_modules() if isinstance(module, self.new_module_classes)]

    @property
    def backend(self) -> str:
        """How one token per row is computed: ``torch`` or ``triton``."""
        return self.model.backend

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

    def _prepare_generation_config(self, generation_config: GenerationConfig | None, **kwargs: Any):
        # Here it stands as it was given; transformers forgets some of its names.
        for asked in (kwargs, vars(generation_config) if generation_config else {}, vars(self.generation_config)):
            if asked.get("cache_implementation") is not None:
                raise ValueError(
                    f"cache_implementation={asked['cache_implementation']!r}: leave it out, PHOTON has its own"
                )
        return super()._prepare_generation_config(generation_config, **kwargs)

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], generation_mode, *args: Any, **_: Any
    ) -> None:
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = self._cache_for_generation(generation_config, generation_mode)

    def _cache_for_generation(self, generation_config: GenerationConfig, generation_mode: Any) -> RowCache:
        return self.new_cache()

    def generate_batch(self, *args: Any, **kwargs: Any) -> None:
        """Not supported: transformers' continuous batching does not know PHOTON's cache and would be silently wrong.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("continuous batching of transformers does not support PHOTON's cache: use generate()")

    init_continuous_batching = generate_batch
