"""The pieces of the hierarchical model: chunker, converter, start state, and stacks of the family's layers."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PretrainedConfig
from transformers import initialization as init

from .attention_photon import ATTENTION_NAME, Segment
from .configuration_hierarchical import HierarchicalConfig
from .families_photon import family


class Chunker(nn.Module):
    """C states -> 1: concatenate, project, scale (the paper's context chunker). Starts as the mean.

    ``[..., C, d] -> [..., d]``; `scale` brings the norm of a mean back to the norm of what it is made of.
    """

    def __init__(self, hidden_size: int, chunk_size: int) -> None:
        super().__init__()
        self.chunk_size = chunk_size
        self.proj = nn.Linear(chunk_size * hidden_size, hidden_size, bias=False)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return (self.scale * self.proj(states.flatten(-2))).to(states.dtype)


class Converter(nn.Module):
    """1 state -> R slots (the paper's context converter): ``[..., d] -> [..., R, d]``. Starts as R copies."""

    def __init__(self, hidden_size: int, num_slots: int) -> None:
        super().__init__()
        self.num_slots = num_slots
        self.proj = nn.Linear(hidden_size, num_slots * hidden_size, bias=False)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        return (self.scale * self.proj(state)).to(state.dtype).unflatten(-1, (self.num_slots, -1))


class StartState(nn.Module):
    """Learned stand-in for the unit before the first of the top level: ``[d]``."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.state = nn.Parameter(torch.zeros(hidden_size))

    def forward(self) -> torch.Tensor:
        return self.state


class InputScale(nn.Module):
    """Learned factor on the children that a decoder reads, set at conversion from measured norms."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return (self.weight * states).to(states.dtype)


class Stack(nn.Module):
    """Decoder layers of the dense family; a decoder's have an `input_scale`."""

    def __init__(self, base_config: PretrainedConfig, num_layers: int, scaled: bool) -> None:
        super().__init__()
        layer = family(base_config.model_type).layer
        self.layers = nn.ModuleList(layer(base_config, index) for index in range(num_layers))
        self.input_scale = InputScale() if scaled else None

    def forward(
        self, hidden: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor], segment: Segment
    ) -> torch.Tensor:
        """Run all layers on ``hidden [B, E, d]``; `segment` says what each element sees."""
        segments = [segment] * len(self.layers)
        for layer in self.layers:
            hidden = layer(hidden, position_embeddings=rotary, photon_segments=segments)
        return hidden


class Level(nn.Module):
    """Level l: chunker and encoder (bottom-up), converter and decoder (top-down)."""

    def __init__(self, base_config: PretrainedConfig, settings: dict) -> None:
        super().__init__()
        hidden = base_config.hidden_size
        self.chunker = Chunker(hidden, settings["chunk_size"])
        self.encoder = Stack(base_config, settings["encoder_layers"], scaled=False)
        self.converter = Converter(hidden, settings["num_slots"])
        self.decoder = Stack(base_config, settings["decoder_layers"], scaled=True)


def stack_config(config: HierarchicalConfig) -> PretrainedConfig:
    """The family's configuration for building stacks: with PHOTON's attention, and layers of one kind."""
    base_config = config.dense_config()
    base_config._attn_implementation = ATTENTION_NAME
    depth = max(max(level["encoder_layers"], level["decoder_layers"]) for level in config.levels)
    if getattr(base_config, "layer_types", None) is not None:
        base_config.layer_types = ["full_attention"] * depth
    return base_config


def initialize(module: nn.Module) -> bool:
    """Give the hierarchy's own parameters of `module` their starting values; False if it has none."""
    if isinstance(module, Chunker):
        size = module.chunk_size
        init.copy_(module.proj.weight, _identity_blocks(module.proj.weight, size, 1, 1 / size))
        init.ones_(module.scale)
    elif isinstance(module, Converter):
        init.copy_(module.proj.weight, _identity_blocks(module.proj.weight, module.num_slots, 0))
        init.ones_(module.scale)
    elif isinstance(module, StartState):
        init.zeros_(module.state)
    elif isinstance(module, InputScale):
        init.ones_(module.weight)
    else:
        return False
    return True


def _identity_blocks(weight: torch.Tensor, count: int, dim: int, factor: float = 1.0) -> torch.Tensor:
    eye = torch.eye(min(weight.shape), dtype=weight.dtype, device=weight.device) * factor
    return torch.cat([eye] * count, dim=dim)
