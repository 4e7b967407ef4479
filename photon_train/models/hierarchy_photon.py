"""The pieces of the hierarchy: chunker, converter, start state, unit memory, and stacks of the family's layers."""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from functools import partial

import torch
from torch import nn
from transformers import PretrainedConfig
from transformers import initialization as init

from .attention_photon import ATTENTION_NAME, Span
from .configuration_photon import PhotonConfig
from .families_photon import family_classes
from .latent_photon import LatentChunker, LatentConverter


class Chunker(nn.Module):
    """C states -> 1: concatenate, project (paper, context chunker). Starts as the mean.

    ``[..., C, d] -> [..., d]``; `scale` brings the norm of a mean back to the norm of its inputs.
    """

    def __init__(self, hidden_size: int, chunk_size: int) -> None:
        super().__init__()
        self.chunk_size = chunk_size
        self.proj = nn.Linear(chunk_size * hidden_size, hidden_size, bias=False)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.scale * self.proj(states.flatten(-2))


class Converter(nn.Module):
    """1 coarse state -> R conditioning slots (paper, context converter). Starts as R copies.

    ``[..., d] -> [..., R, d]``. With `gated`, a factor that the conversion sets to 0 where it promises the dense
    function at step 0, and that is trained from there (a gate, unlike a zero projection, gets a gradient at once).
    """

    def __init__(self, hidden_size: int, num_slots: int, gated: bool) -> None:
        super().__init__()
        self.num_slots = num_slots
        self.proj = nn.Linear(hidden_size, num_slots * hidden_size, bias=False)
        self.scale = nn.Parameter(torch.ones(1))
        self.gate = nn.Parameter(torch.ones(1)) if gated else None

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        slots = self.scale * self.proj(state).unflatten(-1, (self.num_slots, -1))
        return slots if self.gate is None else self.gate * slots


class StartState(nn.Module):
    """Learned stand-in for the summary before the first top unit: ``[B, 1, d]``."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.state = nn.Parameter(torch.zeros(hidden_size))

    def forward(self, batch: int) -> torch.Tensor:
        return self.state.expand(batch, 1, -1)


class InputScale(nn.Module):
    """Learned factor on what a decoder reads from below, set at conversion from measured norms."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.weight * states


class UnitMemory(nn.Module):
    """One key and value per unit for a decoder layer: a learned pooling of the layer's own, plus corrections.

    The pooling starts as the mean, so that a unit's logit is the mean of its tokens' logits (DESIGN 4). The encoder's
    state corrects it through a gate that starts at zero. With `linear`, so does a linear map of the unit's keys (or
    values), one matrix per head and place, which starts at zero: it can keep tokens apart that a mean blurs. What
    corrects keys is computed relative to the unit's last token and rotated there, so that it depends on distances only.
    """

    def __init__(self, base_config: PretrainedConfig, span: int, linear: bool = False) -> None:
        super().__init__()
        heads = base_config.num_key_value_heads
        head_dim = getattr(base_config, "head_dim", None) or base_config.hidden_size // base_config.num_attention_heads
        self.span, self.heads, self.head_dim = span, heads, head_dim
        self.apply_rotary = family_classes(base_config.model_type).apply_rotary
        self.pool_key = nn.Parameter(torch.zeros(heads, span))
        self.pool_value = nn.Parameter(torch.zeros(heads, span))
        self.key_proj = nn.Linear(base_config.hidden_size, heads * head_dim, bias=False)
        self.value_proj = nn.Linear(base_config.hidden_size, heads * head_dim, bias=False)
        self.key_gate = nn.Parameter(torch.zeros(heads))
        self.value_gate = nn.Parameter(torch.zeros(heads))
        shape = (heads, span, head_dim, head_dim)
        self.mix_key = nn.Parameter(torch.zeros(shape)) if linear else None
        self.mix_value = nn.Parameter(torch.zeros(shape)) if linear else None

    def forward(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        unit_states: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        excluded: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Pool the tokens under U units.

        Args:
            keys, values: The layer's own, rotated, ``[B, Hkv, U, S, D]``.
            unit_states: Encoder states of the units, ``[B, U, d]``.
            rotary: Cosine and sine at each unit's last token, ``[B or 1, U, D]``.
            excluded: Tokens counted elsewhere (sinks), ``[B or 1, U, S]``.

        Returns:
            Unit keys and values, ``[B, Hkv, U, D]``.
        """
        key = self._project(self.key_proj, unit_states, self.key_gate)
        value = self._project(self.value_proj, unit_states, self.value_gate)
        if self.mix_key is not None:
            key = key + self._mix(self._turn_back(keys, rotary), self.mix_key, excluded)
            value = value + self._mix(values, self.mix_value, excluded)
        key = self.apply_rotary(key, key, *rotary)[1]
        key = key + self._pool(keys, self.pool_key, excluded)
        value = value + self._pool(values, self.pool_value, excluded)
        return key.to(keys.dtype), value.to(values.dtype)

    def _project(self, proj: nn.Linear, states: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        projected = proj(states).unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)
        return gate[:, None, None] * projected

    def _turn_back(self, keys: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Keys ``[B, Hkv, U, S, D]`` as seen from each unit's last token."""
        cosine, sine = rotary
        flat = keys.transpose(2, 3).flatten(1, 2)
        return self.apply_rotary(flat, flat, cosine, -sine)[1].unflatten(1, (self.heads, self.span)).transpose(2, 3)

    @staticmethod
    def _mix(states: torch.Tensor, matrices: torch.Tensor, excluded: torch.Tensor) -> torch.Tensor:
        states = states.masked_fill(excluded[:, None, :, :, None], 0.0)
        return torch.einsum("bhusd,hsde->bhue", states, matrices.to(states.dtype))

    @staticmethod
    def _pool(states: torch.Tensor, logits: torch.Tensor, excluded: torch.Tensor) -> torch.Tensor:
        lowest = torch.finfo(logits.dtype).min
        weights = logits[None, :, None, :].masked_fill(excluded[:, None], lowest).softmax(dim=-1)
        return (weights.to(states.dtype).unsqueeze(-1) * states).sum(dim=-2)


class PhotonStack(nn.Module):
    """Decoder layers of the dense family, run with a span per layer.

    Args:
        config: The PHOTON configuration.
        base_config: The family's configuration with PHOTON's attention set.
        num_layers: Depth.
        reads_below: Whether the stack is a decoder (it then has an `input_scale`).
        memory_spans: For memory layers, the tokens under a unit, by layer index.
        memory_pooling: See `PhotonConfig`.
        latent_sources: Memory layers that make latents.
        latent_parts: See `PhotonConfig.memory_latent_parts`.
    """

    def __init__(
        self,
        base_config: PretrainedConfig,
        num_layers: int,
        reads_below: bool = False,
        memory_spans: dict[int, int] | None = None,
        memory_pooling: str = "mean",
        latent_sources: Collection[int] = (),
        latent_parts: int = 1,
    ) -> None:
        super().__init__()
        layer = family_classes(base_config.model_type).layer
        self.layers = nn.ModuleList(layer(base_config, index) for index in range(num_layers))
        self.input_scale = InputScale() if reads_below else None
        make = partial(UnitMemory, linear=memory_pooling == "linear")
        if memory_pooling == "latent":
            make = partial(LatentConverter, num_parts=latent_parts)
        spans = memory_spans or {}
        self.memory = nn.ModuleDict({str(index): make(base_config, span) for index, span in spans.items()})
        chunkers = {str(index): LatentChunker(base_config, spans[index], latent_parts) for index in latent_sources}
        self.latent = nn.ModuleDict(chunkers)

    def forward(
        self,
        hidden: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        spans: Sequence[Span],
        start: int = 0,
        stop: int | None = None,
    ) -> torch.Tensor:
        """Run layers ``start ... stop - 1`` on ``hidden [B, E, d]``; ``spans[i]`` belongs to layer i."""
        for index in range(len(self.layers))[start:stop]:
            hidden = self.layers[index](hidden, position_embeddings=rotary, photon_span=spans[index])
        return hidden


class PhotonLevel(nn.Module):
    """Level l: chunker and encoder (bottom-up), converter and decoder (top-down)."""

    def __init__(self, config: PhotonConfig, base_config: PretrainedConfig, index: int) -> None:
        super().__init__()
        level, hidden = config.levels[index], base_config.hidden_size
        self.chunker = Chunker(hidden, level["chunk_size"])
        self.encoder = PhotonStack(base_config, level["encoder_layers"])
        conditions = config.conditioning != "memory"
        gated = index == 0 and config.conditioning == "residual"
        self.converter = Converter(hidden, level["num_slots"], gated) if conditions else None
        memory_spans = {
            layer: config.span(units) for layer, units in zip(config.memory_layers, config.memory_levels, strict=True)
        }
        self.decoder = (
            PhotonStack(
                base_config,
                level["decoder_layers"],
                reads_below=True,
                memory_spans=memory_spans if index == 0 else None,
                memory_pooling=config.memory_pooling,
                latent_sources=config.source_levels if index == 0 and config.memory_pooling == "latent" else (),
                latent_parts=config.memory_latent_parts,
            )
            if level["decoder_layers"]
            else None
        )


def stack_config(config: PhotonConfig) -> PretrainedConfig:
    """The family's configuration for building stacks, with PHOTON's attention function selected."""
    base_config = copy.deepcopy(config.family_config())
    base_config._attn_implementation = ATTENTION_NAME
    return base_config


def _identity_blocks(weight: torch.Tensor, count: int, dim: int, factor: float = 1.0) -> torch.Tensor:
    eye = torch.eye(min(weight.shape), dtype=weight.dtype, device=weight.device) * factor
    return torch.cat([eye] * count, dim=dim)


def initialize(module: nn.Module, initializer_range: float) -> bool:
    """Give the hierarchy's own parameters of `module` their starting values; False if it has none."""
    if isinstance(module, Chunker):
        size = module.chunk_size
        init.copy_(module.proj.weight, _identity_blocks(module.proj.weight, size, 1, 1 / size))
        init.ones_(module.scale)
    elif isinstance(module, Converter):
        init.copy_(module.proj.weight, _identity_blocks(module.proj.weight, module.num_slots, 0))
        init.ones_(module.scale)
        if module.gate is not None:
            init.ones_(module.gate)
    elif isinstance(module, StartState):
        init.zeros_(module.state)
    elif isinstance(module, InputScale):
        init.ones_(module.weight)
    elif isinstance(module, UnitMemory):
        for parameter in module.parameters(recurse=False):
            init.zeros_(parameter)
        for projection in (module.key_proj, module.value_proj):
            init.normal_(projection.weight, std=initializer_range)
    elif isinstance(module, LatentChunker):
        for part in module.parts:
            init.copy_(part.weight, _identity_blocks(part.weight, module.span, 1, 1 / module.span))
        init.normal_(module.state_proj.weight, std=initializer_range)
        init.zeros_(module.state_gate)
    elif isinstance(module, LatentConverter):
        for part in module.parts:
            init.copy_(part.weight, _identity_blocks(part.weight, module.span, 0))
            init.zeros_(part.bias)
    else:
        return False
    return True
