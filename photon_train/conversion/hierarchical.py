"""Presets `split` and `paper`: from a dense configuration and settings to a `HierarchicalConfig`, and its tensors.

Both divide the dense layers into the stacks of the hierarchy: encoders from the lowest level up, then decoders from the
top level down, a share of N / 2L each. Choices where the user makes none: 2 levels of 4 units per chunk; encoders below
the top look back on 64 units, the top one on all.

==========  ===============================================  ================
..          split                                            paper
==========  ===============================================  ================
tokens      one stream with a window and sinks               isolated chunks
slots R     1                                                chunk size
==========  ===============================================  ================

The stream's window is 256 tokens, or 64 for models of hidden size <= 512, and never less than the tokens under a top
unit; 4 sinks stay visible.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PretrainedConfig

from photon_train.accounting.shape import Shape
from photon_train.config import LevelOverrides, PhotonSettings, RunConfig
from photon_train.conversion.families import family_of, layer_config
from photon_train.conversion.plan import TensorPlan
from photon_train.conversion.scales import calibrate
from photon_train.conversion.target import NUM_SINKS, ROLES, Target, copied, default_window
from photon_train.errors import PhotonError
from photon_train.models import HierarchicalConfig, HierarchicalForCausalLM
from photon_train.models.families_photon import LLAMA_LIKE

LEVELS, CHUNK_SIZE, ENCODER_WINDOW = 2, 4, 64
LAYOUTS = {"split": "stream", "paper": "block"}
_OF_GRAFT = ("chunk_size", "memory_cells", "memory_budget", "memory_bits", "latents_per_unit")
_OF_STREAMS = ("window", "num_sinks")

_STACK = re.compile(r"model\.levels\.(\d+)\.(encoder|decoder)\.layers\.(\d+)\.(.+)")
_NEW = re.compile(r"model\.levels\.(\d+)\.(?:decoder\.)?(chunker|converter|input_scale)\.(.+)")
_VALUES = {
    ("chunker", "proj.weight"): ("mean_chunk", {}),
    ("converter", "proj.weight"): ("identity_slots", {}),
}


def configure(dense: PretrainedConfig, settings: RunConfig) -> HierarchicalConfig:
    """The configuration of the hierarchy that a dense model's layers are divided into.

    Args:
        dense: The dense model's configuration.
        settings: The run's; read are `preset`, `photon`, `consistency` and `train.seq_len`.

    Raises:
        PhotonError: naming the dotted key and the fix, for settings that the preset or the model cannot serve.
    """
    family_of(dense)
    photon, preset = settings.photon, settings.preset
    layout = LAYOUTS[preset]
    unused = (*_OF_GRAFT, "full_attention_layers", *(_OF_STREAMS if layout == "block" else ()))
    for key in unused:
        if getattr(photon, key) not in (None, []):
            raise PhotonError(f"photon.{key} has no effect with preset {preset}: drop it")
    overrides = _levels(photon)
    chunks = [override.chunk_size or CHUNK_SIZE for override in overrides]
    if math.prod(chunks) < 2:
        raise PhotonError(
            "photon.levels.0.chunk_size=1 makes no hierarchy: the chunk sizes must multiply to at least 2"
        )
    encoders, decoders = _depths(dense.num_hidden_layers, preset, overrides)
    levels = [
        {
            "chunk_size": chunk,
            "num_slots": override.num_slots or (chunk if preset == "paper" else 1),
            "encoder_layers": encoders[index],
            "encoder_window": _encoder_window(override.encoder_window, is_top=index == len(chunks) - 1),
            "decoder_layers": decoders[index],
        }
        for index, (override, chunk) in enumerate(zip(overrides, chunks, strict=True))
    ]
    consistency = settings.consistency.weight
    if consistency and not any(decoders[1:]):
        raise PhotonError(
            f"consistency.weight={consistency} needs a decoder above level 1, which a model of 1 level does not have: "
            "set it to 0, or raise photon.num_levels"
        )
    layers = layer_config(dense, settings.train.seq_len)
    if layers["model_type"] not in LLAMA_LIKE:
        raise PhotonError(
            f"preset {preset} takes layers apart and knows only {', '.join(LLAMA_LIKE)}: use preset graft for family "
            f"{layers['model_type']}"
        )
    try:
        config = HierarchicalConfig(
            base_config=layers,
            levels=levels,
            layout=layout,
            consistency_weight=consistency,
            preset=preset,
            **(_stream(dense, photon, math.prod(chunks)) if layout == "stream" else {}),
        )
    except ValueError as error:  # its messages begin with the key
        raise PhotonError(f"photon.{error}") from error
    _check_groups(config, _least_window(dense))
    return config


def _least_window(dense: PretrainedConfig) -> int | None:
    """The shortest sliding window of the dense layers; None: all see everything."""
    return min((each for each in Shape.of(dense).windows if each is not None), default=None)


def _check_groups(config: HierarchicalConfig, own: int | None) -> None:
    """No dense layer has learned to look further back than its own window."""
    for index in range(config.num_levels):
        stream = config.slot_stream(index)
        if own is not None and stream.isolated and stream.period > own:
            raise PhotonError(
                f"photon.levels.{index}: {stream.num_slots} slots and a chunk of {stream.chunk_size} are seen "
                f"together, which exceeds the dense model's sliding_window={own}: lower chunk_size or num_slots"
            )


def _levels(photon: PhotonSettings) -> list[LevelOverrides]:
    """The overrides of every level, those that the user left out included."""
    count = photon.num_levels or max(LEVELS, len(photon.levels))
    return [*photon.levels, *(LevelOverrides() for _ in range(count - len(photon.levels)))]


def _encoder_window(value: int | None, is_top: bool) -> int | None:
    if value is None:
        return None if is_top else ENCODER_WINDOW
    return value or None  # 0 is unbounded


def _depths(total: int, preset: str, overrides: Sequence[LevelOverrides]) -> tuple[list[int], list[int]]:
    """Depth of the encoder and of the decoder of each level: their shares of the dense layers.

    Layers left over by the division go to the token decoder first, then to the top encoder, then to the
    others from the bottom up: the tokens are what the model is judged by, and the top encoder runs least often.
    """
    count = len(overrides)
    stacks = [("encoder_layers", level) for level in range(count)]
    stacks += [("decoder_layers", level) for level in reversed(range(count))]
    depths = {stack: getattr(overrides[stack[1]], stack[0]) for stack in stacks}
    free = [stack for stack in stacks if depths[stack] is None]
    left = total - sum(depth for depth in depths.values() if depth is not None)
    if left < len(free) or (not free and left):
        raise PhotonError(
            f"preset {preset} with {count} levels divides the {total} dense layers into {len(stacks)} stacks of at "
            "least 1, each layer once: lower photon.num_levels, or let photon.levels.*.encoder_layers and "
            f"decoder_layers add up to {total}"
        )
    if depths[("decoder_layers", 0)] == 0:
        raise PhotonError("photon.levels.0.decoder_layers=0: the token decoder needs at least 1 layer")
    if free:
        share, rest = divmod(left, len(free))
        order = [("decoder_layers", 0), ("encoder_layers", count - 1)]
        order = [stack for stack in order if stack in free] + [stack for stack in free if stack not in order]
        for rank, stack in enumerate(order):
            depths[stack] = share + (rank < rest)
    return tuple([depths[kind, level] for level in range(count)] for kind in ("encoder_layers", "decoder_layers"))


def _stream(dense: PretrainedConfig, photon: PhotonSettings, top_unit: int) -> dict[str, int]:
    """Window and sinks of the token stream."""
    window = max(top_unit, default_window(dense)) if photon.window is None else photon.window
    if window < top_unit:
        raise PhotonError(
            f"photon.window={window} does not reach back over the open unit: it must be at least {top_unit}, the "
            "tokens under one top unit; raise it, or lower photon.levels.*.chunk_size"
        )
    own = _least_window(dense)
    if own is not None and window > own:
        raise PhotonError(f"photon.window={window} exceeds the dense model's sliding_window={own}: lower it")
    return {"window": window, "num_sinks": NUM_SINKS if photon.num_sinks is None else photon.num_sinks}


def copied_layers(config: Any) -> tuple[list[range], list[range]]:
    """Per level, from the lowest up, the dense layers that its encoder and its decoder copy: each once, in order."""
    encoders, decoders, begin = [], [], 0
    for level in config.levels:
        encoders.append(range(begin, begin + level["encoder_layers"]))
        begin += level["encoder_layers"]
    for level in reversed(config.levels):
        decoders.insert(0, range(begin, begin + level["decoder_layers"]))
        begin += level["decoder_layers"]
    return encoders, decoders


def plan_tensor(name: str, shape: tuple[int, ...], dense: PretrainedConfig, config: Any) -> TensorPlan:
    """The dense layers divided among the stacks; new modules start as means and copies."""
    if name in ROLES:
        return copied(name, shape, dense, ROLES[name])
    if match := _STACK.fullmatch(name):
        level, stack = int(match[1]), match[2]
        role = "token decoder" if stack == "decoder" and level == 0 else stack
        encoders, decoders = copied_layers(config)
        layer = (encoders if stack == "encoder" else decoders)[level][int(match[3])]
        return copied(name, shape, dense, role, level + 1, f"model.layers.{layer}.{match[4]}")
    if name == "model.start.state":
        return TensorPlan(name, "constant", "start state", len(config.levels), shape, (), {"value": 0.0})
    if (match := _NEW.fullmatch(name)) is None:
        raise PhotonError(f"conversion plan: target {name}: no rule makes it")
    operator, arguments = _VALUES.get((match[2], match[3]), ("constant", {"value": 1.0}))
    return TensorPlan(name, operator, match[2].replace("_", " "), int(match[1]) + 1, shape, (), arguments)


def _fit(model: Any, batches: Sequence[torch.Tensor], on_batch: Callable[[int, int], None]) -> list[str]:
    names = list(calibrate(model, batches[:1]))
    on_batch(1, 1)
    return names


HIERARCHICAL = Target(
    preserves_dense=False,
    preset=lambda config: config.preset,
    configure=configure,
    model=HierarchicalForCausalLM,
    plan=plan_tensor,
    fit=_fit,
)
