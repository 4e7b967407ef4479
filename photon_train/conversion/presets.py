"""From a preset's name and the user's overrides to a `PhotonConfig`, and to the layers that are copied (DESIGN 4).

Preset choices where the user gives none:

=============  =================  ==================  ==================  ==================
..             graft              hourglass           split               paper
=============  =================  ==================  ==================  ==================
layout         stream             stream              stream              block
conditioning   memory             residual            slots               slots
levels, C      1, (4)             1, (4)              2, (4, 4)           2, (4, 4)
slots R        1                  1                   1                   C
dense layers   all: token         lower + upper:      in order: encoders from the lowest level
               decoder            token decoder;      up, then decoders from the top level down
                                  middle: encoder     (a share of N / 2L each)
added copies   none               none                none                none
=============  =================  ==================  ==================  ==================

Stream windows are 256 tokens, or 64 for models of hidden size <= 512 (such as the demo's), and never less than
the span of the top unit; 4 sinks stay visible. Encoders below the top look back on 64 units, the top one on all.
`graft`'s memory is N / 8 layers with a latent each, one per 4 tokens (8 in models of fewer than 8 layers): 3.1% of the
dense model's growing KV. What the quality study found best at that size (docs/quality.md). The layers should come
from a probe of the dense model (`photon.choose_layers`); without one they lie evenly in the upper half. Latents wider
than 4,096 numbers (models without grouped heads) are packed in two parts.

With another pooling or conditioning, `graft` has 2 levels with C = (4, 4), and level encoders of 1 layer each and N / 8
at the top, copies of the lowest dense layers from `branch_layer` upward; pooled memory is then in every second layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig

from photon_train.accounting.model import Shape
from photon_train.config import LevelOverrides, PhotonSettings, RunConfig
from photon_train.conversion.families import attention_span, family_of, layer_config
from photon_train.errors import PhotonError
from photon_train.models.configuration_photon import PhotonConfig

CHUNK_SIZE = 4
POOLING = "latent"
LATENT_SHARE = 8  # one memory layer in so many
# Width of a latent (all keys and values of a token) beyond which its halves are packed apart: its maps grow with the
# square of it, and models without grouped heads have wide ones.
WIDE_LATENT = 4096
ENCODER_WINDOW = 64
NUM_SINKS = 4
_MEMORY_KEYS = ("memory_layers", "memory_level", "memory_pooling", "memory_latents", "memory_latent_parts")
WINDOW, SMALL_WINDOW, SMALL_HIDDEN = 256, 64, 512


@dataclass(frozen=True)
class Preset:
    """What a preset allows and chooses.

    Attributes:
        levels: Default number of levels.
        layouts: Allowed layouts, the default first.
        conditionings: Allowed conditionings, the default first.
        summary: What the top encoder hands down.
    """

    levels: int
    layouts: tuple[str, ...]
    conditionings: tuple[str, ...]
    summary: str = "state"


_CHOICES = {
    "graft": Preset(2, ("stream",), ("memory", "residual", "slots")),
    "hourglass": Preset(1, ("stream",), ("residual",), summary="change"),
    "split": Preset(2, ("stream", "block"), ("slots", "residual", "memory")),
    "paper": Preset(2, ("block",), ("slots",)),
}


@dataclass(frozen=True)
class LayerMap:
    """For every layer of every target stack, the dense layer that it copies.

    Attributes:
        encoders: Per level, from the lowest up.
        decoders: Per level, from the lowest up; ``decoders[0]`` is the token decoder.
    """

    encoders: tuple[tuple[int, ...], ...]
    decoders: tuple[tuple[int, ...], ...]


def photon_config(dense: PretrainedConfig, settings: RunConfig) -> PhotonConfig:
    """The PHOTON configuration for a dense model.

    Args:
        dense: The dense model's configuration.
        settings: The run's settings; read are `preset`, `photon`, `consistency` and `train.seq_len`.

    Raises:
        PhotonError: naming the dotted key and the mend, for settings that the preset or the model cannot serve.
    """
    return _build(dense, settings)[0]


def layer_map(dense: PretrainedConfig, settings: RunConfig) -> LayerMap:
    """Which dense layer every target layer copies; arguments and errors as in `photon_config`."""
    return _build(dense, settings)[1]


def _build(dense: PretrainedConfig, settings: RunConfig) -> tuple[PhotonConfig, LayerMap]:
    family_of(dense)
    photon, preset = settings.photon, _CHOICES[settings.preset]
    layout = _choose("photon.layout", photon.layout, preset.layouts, settings.preset)
    allowed = ("slots",) if layout == "block" else preset.conditionings
    conditioning = _choose("photon.conditioning", photon.conditioning, allowed, settings.preset)
    latent = settings.preset == "graft" and conditioning == "memory" and _pooling(photon) == "latent"
    overrides = _levels(photon, 1 if latent else preset.levels, settings.preset)
    chunk_size = 2 * CHUNK_SIZE if latent and dense.num_hidden_layers < LATENT_SHARE else CHUNK_SIZE
    chunks = [override.chunk_size or chunk_size for override in overrides]
    span = _product(chunks)
    if span < 2:
        raise PhotonError(
            "photon.levels.0.chunk_size=1 makes no hierarchy: the chunk sizes must multiply to at least 2"
        )
    if settings.train.seq_len % span:
        raise PhotonError(
            f"train.seq_len={settings.train.seq_len} is not a multiple of the {span} tokens under one top unit "
            f"(chunk sizes {chunks}): change train.seq_len or photon.levels.*.chunk_size"
        )
    branch, layers = _partition(dense.num_hidden_layers, settings, overrides, conditioning)
    stream = _stream_settings(dense, settings, layout, conditioning, span, branch, layers)
    levels = [
        {
            "chunk_size": chunk,
            "num_slots": _num_slots(index, override, chunk, settings.preset, layout, conditioning),
            "encoder_layers": len(layers.encoders[index]),
            "encoder_window": _encoder_window(index, override.encoder_window, len(chunks)),
            "decoder_layers": len(layers.decoders[index]),
        }
        for index, (override, chunk) in enumerate(zip(overrides, chunks, strict=True))
    ]
    consistency = settings.consistency.weight
    if consistency and not any(level["decoder_layers"] for level in levels[1:]):
        raise PhotonError(
            f"consistency.weight={consistency} needs a decoder above level 1, which preset {settings.preset} with "
            f"conditioning {conditioning} does not have: set it to 0, or use preset split or paper"
        )
    try:
        config = PhotonConfig(
            base_config=layer_config(dense, settings.train.seq_len),
            levels=levels,
            layout=layout,
            conditioning=conditioning,
            summary=preset.summary,
            unit_positions=photon.unit_positions,
            consistency_weight=consistency,
            preset=settings.preset,
            branch_layer=branch,
            **stream,
        )
    except ValueError as error:  # its messages begin with the key
        raise PhotonError(f"photon.{error}") from error
    return config, layers


def _choose(key: str, value: str | None, allowed: Sequence[str], preset: str) -> str:
    if value is None:
        return allowed[0]
    if value not in allowed:
        raise PhotonError(f"{key}={value!r}: preset {preset} can serve {' or '.join(allowed)}")
    return value


def _product(values: Sequence[int]) -> int:
    result = 1
    for value in values:
        result *= value
    return result


def _pooling(photon: PhotonSettings) -> str:
    return photon.memory_pooling or POOLING


def _levels(photon: PhotonSettings, default: int, name: str) -> list[LevelOverrides]:
    """The overrides of every level, those that the user left out included."""
    count = photon.num_levels or max(default, len(photon.levels))
    if name == "hourglass" and count != 1:
        raise PhotonError(f"photon.num_levels={count}: preset hourglass has 1 level; use preset split for more")
    return [*photon.levels, *(LevelOverrides() for _ in range(count - len(photon.levels)))]


def _num_slots(index: int, override: LevelOverrides, chunk: int, preset: str, layout: str, conditioning: str) -> int:
    if conditioning == "memory" and override.num_slots is not None:
        raise PhotonError(f"photon.levels.{index}.num_slots has no effect with conditioning memory: drop it")
    return override.num_slots or (chunk if preset == "paper" else 1)


def _encoder_window(index: int, value: int | None, count: int) -> int | None:
    if value is None:
        return None if index == count - 1 else ENCODER_WINDOW
    return value or None  # 0 is unbounded


def _partition(
    total: int, settings: RunConfig, overrides: Sequence[LevelOverrides], conditioning: str
) -> tuple[int, LayerMap]:
    """The branch layer and the copied layers of every stack."""
    photon = settings.photon
    for index, override in enumerate(overrides):
        if index and override.decoder_layers and conditioning == "memory":
            raise PhotonError(
                f"photon.levels.{index}.decoder_layers={override.decoder_layers}: conditioning memory has no decoders "
                "above the tokens; set it to 0"
            )
    if settings.preset == "graft":
        return _partition_graft(total, photon, overrides, conditioning == "memory" and _pooling(photon) == "latent")
    if settings.preset == "hourglass":
        return _partition_hourglass(total, photon, overrides[0])
    if photon.branch_layer:
        raise PhotonError(f"photon.branch_layer={photon.branch_layer}: preset {settings.preset} branches at 0; drop it")
    return 0, _partition_split(total, settings.preset, overrides, conditioning)


def _partition_graft(
    total: int, photon: PhotonSettings, overrides: Sequence[LevelOverrides], latent: bool
) -> tuple[int, LayerMap]:
    for index, override in enumerate(overrides):
        kept = total if index == 0 else 0
        if override.decoder_layers not in (None, kept):
            raise PhotonError(
                f"photon.levels.{index}.decoder_layers={override.decoder_layers}: preset graft keeps the {total} dense "
                "layers as the token decoder and adds no decoders above it; drop it, or use preset split"
            )
    branch = photon.branch_layer or 0
    _check_branch(branch, total)
    depths = []
    for index, override in enumerate(overrides):
        default = max(1, total // 8) if index == len(overrides) - 1 else 1
        default = 0 if latent else default
        depths.append(default if override.encoder_layers is None else override.encoder_layers)
    if sum(depths) > total:
        raise PhotonError(
            f"photon.levels.*.encoder_layers add up to {sum(depths)}, but the dense model has {total} layers to copy: "
            "lower them, or photon.num_levels"
        )
    # Copies go on where the encoder's input was read; near the top there are not enough layers above it.
    start = min(branch, total - sum(depths))
    encoders = _consecutive(start, depths)
    return branch, LayerMap(encoders, (tuple(range(total)), *((),) * (len(overrides) - 1)))


def _partition_hourglass(total: int, photon: PhotonSettings, level: LevelOverrides) -> tuple[int, LayerMap]:
    if total < 3:
        raise PhotonError(f"preset hourglass needs 3 or more dense layers; this model has {total}: use preset graft")
    middle, outer = level.encoder_layers, level.decoder_layers
    if middle is None:
        middle = total - (2 * max(1, total // 4) if outer is None else outer)
    outer = total - middle if outer is None else outer
    if middle + outer != total or middle < 1 or outer < 1:
        raise PhotonError(
            f"photon.levels.0.encoder_layers={middle} and decoder_layers={outer} must be positive and add up to the "
            f"{total} dense layers: preset hourglass uses each once"
        )
    branch = outer // 2 if photon.branch_layer is None else photon.branch_layer
    _check_branch(branch, outer)
    upper = range(branch + middle, total)
    return branch, LayerMap((tuple(range(branch, branch + middle)),), ((*range(branch), *upper),))


def _check_branch(branch: int, depth: int) -> None:
    if not 0 <= branch < depth:
        raise PhotonError(f"photon.branch_layer={branch} must be in 0...{depth - 1}, below the token decoder's depth")


def _partition_split(total: int, preset: str, overrides: Sequence[LevelOverrides], conditioning: str) -> LayerMap:
    """Give each stack its share of the dense layers, bottom to top: encoders upward, decoders downward.

    Layers left over by the division go to the token decoder first, then to the top encoder, then to the
    others from the bottom up: the tokens are what the model is judged by, and the top encoder runs least often.
    """
    count = len(overrides)
    decoder_levels = [0] if conditioning == "memory" else list(range(count - 1, -1, -1))
    stacks = [("encoder_layers", level) for level in range(count)]
    stacks += [("decoder_layers", level) for level in decoder_levels]
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
    copied = dict(zip(stacks, _consecutive(0, [depths[stack] for stack in stacks]), strict=True))
    return LayerMap(
        tuple(copied[("encoder_layers", level)] for level in range(count)),
        tuple(copied.get(("decoder_layers", level), ()) for level in range(count)),
    )


def _consecutive(start: int, depths: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    result = []
    for depth in depths:
        result.append(tuple(range(start, start + depth)))
        start += depth
    return tuple(result)


def _stream_settings(
    dense: PretrainedConfig,
    settings: RunConfig,
    layout: str,
    conditioning: str,
    span: int,
    branch: int,
    layers: LayerMap,
) -> dict[str, Any]:
    """Window, sinks and the layers with memory or full attention."""
    photon, depth = settings.photon, len(layers.decoders[0])
    if layout == "block":
        for key in ("window", "num_sinks", "full_attention_layers", *_MEMORY_KEYS):
            if getattr(photon, key):
                raise PhotonError(f"photon.{key} has no effect with layout block: drop it, or use preset split")
        return {}
    default = SMALL_WINDOW if dense.hidden_size <= SMALL_HIDDEN else WINDOW
    window = max(span, default) if photon.window is None else photon.window
    if window < span:
        raise PhotonError(
            f"photon.window={window} does not reach back over the open unit: it must be at least {span}, the tokens "
            "under one top unit; raise it, or lower photon.levels.*.chunk_size"
        )
    dense_span = attention_span(dense)
    if dense_span is not None and window > dense_span:
        raise PhotonError(f"photon.window={window} exceeds the dense model's sliding_window={dense_span}: lower it")
    sinks = NUM_SINKS if photon.num_sinks is None else photon.num_sinks
    full = list(photon.full_attention_layers)
    _check_layers("photon.full_attention_layers", full, depth)
    result: dict[str, Any] = {"window": window, "num_sinks": sinks, "full_attention_layers": full}
    if conditioning != "memory":
        for key in _MEMORY_KEYS:
            if getattr(photon, key):
                raise PhotonError(f"photon.{key} needs photon.conditioning=memory: set that, or drop it")
        return result
    return result | _memory_settings(dense, photon, len(layers.encoders), full, depth, branch)


def _memory_settings(
    dense: PretrainedConfig, photon: PhotonSettings, count: int, full: list[int], depth: int, branch: int
) -> dict[str, Any]:
    pooling, memory = _pooling(photon), photon.memory_layers
    if memory is None:
        if pooling == "latent":
            number = max(1, depth // LATENT_SHARE) if photon.num_memory_layers is None else photon.num_memory_layers
            step = max(1, depth // (2 * number))
            memory = sorted(range(depth - 1, -1, -step)[:number])
        else:
            memory = range(branch + 1, depth, 2)  # the upper one of every two layers
        memory = [layer for layer in memory if branch <= layer and layer not in full]
        memory = memory or [layer for layer in range(branch, depth) if layer not in full][-1:]
    _check_layers("photon.memory_layers", memory, depth)
    if not memory:
        raise PhotonError("photon.memory_layers is empty: conditioning memory needs a layer that reads the units")
    if min(memory) < branch:
        raise PhotonError(
            f"photon.memory_layers names layer {min(memory)}, below photon.branch_layer={branch}: units are read there"
        )
    both = sorted(set(memory) & set(full))
    if both:
        raise PhotonError(f"layers {both} are in photon.memory_layers and photon.full_attention_layers: keep one")
    level = count if photon.memory_level is None else photon.memory_level
    if not 1 <= level <= count:
        raise PhotonError(f"photon.memory_level={level} must be in 1...{count} (photon.num_levels)")
    if level < count:
        raise PhotonError(
            f"photon.memory_level={level} leaves the levels above it unused: set photon.num_levels={level}"
        )
    sources = _memory_sources(photon, memory, pooling)
    levels = [level] * len(memory)
    return {
        "memory_layers": memory,
        "memory_levels": levels,
        "memory_pooling": pooling,
        "memory_sources": sources,
        "memory_latent_parts": _latent_parts(dense, photon, pooling),
    }


def _latent_parts(dense: PretrainedConfig, photon: PhotonSettings, pooling: str) -> int:
    parts = photon.memory_latent_parts
    if parts is None:
        return 2 if pooling == "latent" and Shape.of(dense).kv > WIDE_LATENT else 1
    if pooling != "latent":
        raise PhotonError(
            f"photon.memory_latent_parts={parts} needs photon.memory_pooling=latent: set that, or drop it"
        )
    return parts


def _memory_sources(photon: PhotonSettings, memory: Sequence[int], pooling: str) -> list[int]:
    """For each memory layer, the one whose entries it reads: consecutive groups, the first of each its source."""
    count = photon.memory_latents
    if count is None:
        return list(memory)
    if pooling != "latent":
        raise PhotonError(f"photon.memory_latents={count} needs photon.memory_pooling=latent: set that, or drop it")
    if not 1 <= count <= len(memory):
        raise PhotonError(
            f"photon.memory_latents={count} must be in 1...{len(memory)}, the number of memory layers: lower it, or "
            "name more photon.memory_layers"
        )
    layers = sorted(memory)
    first = {
        layer: layers[-(-(index * count // len(layers)) * len(layers) // count)] for index, layer in enumerate(layers)
    }
    return [first[layer] for layer in memory]


def _check_layers(key: str, layers: Sequence[int], depth: int) -> None:
    for layer in layers:
        if layer >= depth:
            raise PhotonError(f"{key} names layer {layer}; the token decoder has layers 0...{depth - 1}")
