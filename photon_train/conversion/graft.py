"""The `graft`: from a dense configuration and settings to a `PhotonConfig`, and how its tensors are made.

Choices where the user makes none: a window of 256 tokens, or 64 for models of hidden size <= 512 (such as the demo's),
and 4 sinks; N / 8 memory layers with one latent per 4 tokens (8 in models of fewer than 8 layers), 3.1% of the dense
model's growing KV. The layers should come from a probe of the dense model (`photon.choose_layers`); without one they
lie evenly in the upper half. Latents wider than 4,096 numbers (models without grouped heads) are packed apart, two per
unit. `photon.memory_layers` set to the empty list leaves window and sinks alone (StreamingLLM, arXiv 2309.17453).
"""

from __future__ import annotations

import re

from transformers import PretrainedConfig

from photon_train.accounting.shape import Shape
from photon_train.config import PhotonSettings, RunConfig
from photon_train.conversion.families import family_of, layer_config
from photon_train.conversion.latents import fit_latents
from photon_train.conversion.plan import TensorPlan
from photon_train.conversion.target import NUM_SINKS, ROLES, Target, copied, default_window
from photon_train.errors import PhotonError
from photon_train.models import PhotonConfig, PhotonForCausalLM
from photon_train.models.configuration_photon import PHOTON_KEYS

CHUNK_SIZE = 4
LAYERS_PER_MEMORY = 8
# Width of a latent (all keys and values of a token) beyond which its halves are packed apart: its maps grow with the
# square of it, and models without grouped heads have wide ones.
WIDE_LATENT = 4096

_MEMORY = re.compile(r"model\.layers\.\d+\.self_attn\.memory\.(chunker|converter)\.maps\.\d+\.(weight|bias)")
_VALUES = {
    ("chunker", "weight"): ("mean_chunk", {}),
    ("converter", "weight"): ("identity_slots", {}),
    ("converter", "bias"): ("constant", {"value": 0.0}),
}


def configure(dense: PretrainedConfig, settings: RunConfig) -> PhotonConfig:
    """The configuration of the graft on a dense model.

    Args:
        dense: The dense model's configuration.
        settings: The run's; read are `photon`, `consistency` and `train.seq_len`.

    Raises:
        PhotonError: naming the dotted key and the fix, for settings that the model cannot serve.
    """
    family_of(dense)
    photon = settings.photon
    for key, value in (("num_levels", photon.num_levels), ("levels", photon.levels or None)):
        if value is not None:
            raise PhotonError(f"photon.{key} is for presets split and paper: preset graft has no levels; drop it")
    if settings.consistency.weight:
        raise PhotonError(
            f"consistency.weight={settings.consistency.weight} needs a decoder above the lowest level, which preset "
            "graft does not have: set it to 0, or use preset split or paper"
        )
    layers = layer_config(dense, settings.train.seq_len)
    chunk_size, window = photon.chunk_size, photon.window
    if chunk_size is None:
        chunk_size = CHUNK_SIZE if dense.num_hidden_layers >= LAYERS_PER_MEMORY else 2 * CHUNK_SIZE
    if window is None:
        window = max(chunk_size, default_window(dense))
    parts = photon.latents_per_unit
    if parts is None:
        parts = 2 if Shape.of(dense).kv > WIDE_LATENT else 1
    memory = _default_layers(dense, photon) if photon.memory_layers is None else photon.memory_layers
    for key in ("chunk_size", "latents_per_unit"):
        if not memory and getattr(photon, key) is not None:
            raise PhotonError(f"photon.{key} is for memory layers, and photon.memory_layers is empty: drop one of both")
    try:
        return PhotonConfig(
            base_model_type=layers.pop("model_type"),
            window=window,
            num_sinks=NUM_SINKS if photon.num_sinks is None else photon.num_sinks,
            chunk_size=chunk_size,
            memory_layers=memory,
            latents_per_unit=parts,
            full_attention_layers=photon.full_attention_layers,
            **layers,
        )
    except ValueError as error:
        message, count = re.subn(rf"\b({'|'.join(PHOTON_KEYS)})\b", r"photon.\1", str(error))
        raise PhotonError(message if count else f"config.json: {message}") from error


def memory_candidates(dense: PretrainedConfig, photon: PhotonSettings) -> list[int]:
    """Layers that can have a memory: neither at full attention nor kept local by the family.

    Raises:
        PhotonError: if `photon.num_memory_layers` asks for more than there are.
    """
    windows = Shape.of(dense).windows
    local = {layer for layer, own in enumerate(windows) if own is not None} if None in windows else set()
    found = [layer for layer in range(len(windows)) if layer not in {*local, *photon.full_attention_layers}]
    if (photon.num_memory_layers or 0) > len(found):
        raise PhotonError(
            f"photon.num_memory_layers={photon.num_memory_layers}: {len(found)} layers can have memory (those that are "
            "neither in photon.full_attention_layers nor kept local by the family); lower it"
        )
    return found


def _default_layers(dense: PretrainedConfig, photon: PhotonSettings) -> list[int]:
    """Evenly in the upper half of the candidates, the topmost always among them."""
    candidates = memory_candidates(dense, photon)
    number = photon.num_memory_layers or max(1, dense.num_hidden_layers // LAYERS_PER_MEMORY)
    step = max(1, len(candidates) // (2 * number))
    return sorted(candidates[::-1][::step][:number])


def plan_tensor(name: str, shape: tuple[int, ...], dense: PretrainedConfig, config: PhotonConfig) -> TensorPlan:
    """Every dense tensor under its own name; the memory's start as a mean and copies (the fit follows)."""
    if match := _MEMORY.fullmatch(name):
        operator, arguments = _VALUES[match[1], match[2]]
        return TensorPlan(name, operator, f"memory {match[1]}", 0, shape, (), arguments)
    return copied(name, shape, dense, ROLES.get(name, "layers"))


GRAFT = Target(
    preserves_dense=True,
    preset=lambda config: "graft",
    configure=configure,
    model=PhotonForCausalLM,
    plan=plan_tensor,
    fit=fit_latents,
)
