"""The `graft`: from a dense configuration and settings to a `PhotonConfig`, and how its tensors are made.

Choices where the user makes none: a window of 512 tokens, or 64 for models of hidden size <= 512 (such as the demo's),
and 4 sinks; units of 2 tokens in 4 bits, in as many memory cells as a budget of 1% of the dense model's growing KV pays
for, and one at least. Which cells, a probe of the dense model says (`photon_train.pipeline.choose`); until then, and
where the text does not reach beyond the window, they are spread over the upper half. Latents wider than 4,096 numbers
are packed apart, two per unit. `photon.memory_cells` set to the empty list leaves window and sinks alone (StreamingLLM,
arXiv 2309.17453).
"""

from __future__ import annotations

import re

from transformers import PretrainedConfig

from photon_train.accounting.graft import cells_within
from photon_train.accounting.shape import Shape
from photon_train.config import PhotonSettings, RunConfig
from photon_train.conversion.families import family_of, layer_config
from photon_train.conversion.latents import fit_latents
from photon_train.conversion.plan import TensorPlan
from photon_train.conversion.target import NUM_SINKS, ROLES, Target, copied, default_window
from photon_train.errors import PhotonError
from photon_train.models import PhotonConfig, PhotonForCausalLM
from photon_train.models.configuration_photon import PHOTON_KEYS

CHUNK_SIZE = 2
MEMORY_BITS = 4
MEMORY_BUDGET = 1.0  # percent of the dense model's growing KV
# Width of a latent (keys and values of a layer's cells) beyond which its halves are packed apart: its maps grow with
# the square of it.
WIDE_LATENT = 4096
Cells = dict[int, list[int]]

_MEMORY = re.compile(r"model\.layers\.\d+\.self_attn\.memory\.(chunker|converter)\.maps\.\d+\.(weight|bias)")
_VALUES = {
    ("chunker", "weight"): ("mean_chunk", {}),
    ("chunker", "bias"): ("constant", {"value": 0.0}),
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
    chunk_size = CHUNK_SIZE if photon.chunk_size is None else photon.chunk_size
    bits = MEMORY_BITS if photon.memory_bits is None else photon.memory_bits
    window = max(chunk_size, default_window(dense)) if photon.window is None else photon.window
    if photon.memory_cells is None:
        cells = _spread(memory_candidates(dense, photon), Shape.of(dense).kv_heads, count_cells(dense, photon))
    else:
        cells = parse_cells(photon.memory_cells)
    parts = photon.latents_per_unit
    if parts is None:
        widest = max(map(len, cells.values()), default=0)
        parts = 2 if 2 * widest * Shape.of(dense).head_dim > WIDE_LATENT else 1
    for key in ("chunk_size", "memory_bits", "latents_per_unit"):
        if not cells and getattr(photon, key) is not None:
            raise PhotonError(f"photon.{key} is for memory cells, and photon.memory_cells is empty: drop one of both")
    try:
        return PhotonConfig(
            base_model_type=layers.pop("model_type"),
            window=window,
            num_sinks=NUM_SINKS if photon.num_sinks is None else photon.num_sinks,
            chunk_size=chunk_size,
            memory_cells=cells,
            memory_bits=bits,
            latents_per_unit=parts,
            full_attention_layers=photon.full_attention_layers,
            **layers,
        )
    except ValueError as error:
        message, count = re.subn(rf"\b({'|'.join(PHOTON_KEYS)})\b", r"photon.\1", str(error))
        raise PhotonError(message if count else f"config.json: {message}") from error


def parse_cells(cells: list[str]) -> Cells:
    """Heads by layer of cells given as layer:head."""
    found: Cells = {}
    for layer, head in sorted(tuple(map(int, cell.split(":"))) for cell in cells):
        found.setdefault(layer, []).append(head)
    return found


def format_cells(cells: Cells) -> list[str]:
    """The inverse of `parse_cells`."""
    return [f"{layer}:{head}" for layer, heads in cells.items() for head in heads]


def count_cells(dense: PretrainedConfig, photon: PhotonSettings) -> int:
    """Memory cells that `photon.memory_budget` pays for; where it is unset, one at least (of models with few heads).

    Raises:
        PhotonError: if a budget that is set pays for none.
    """
    chunk_size = CHUNK_SIZE if photon.chunk_size is None else photon.chunk_size
    bits = MEMORY_BITS if photon.memory_bits is None else photon.memory_bits
    budget = MEMORY_BUDGET if photon.memory_budget is None else photon.memory_budget
    # A cell is not lost to the rounding of a product.
    count = cells_within(budget, dense, chunk_size, bits) + 1e-9
    if photon.memory_budget is None:
        count = max(count, 1.0)
    if count < 1:
        raise PhotonError(
            f"photon.memory_budget={budget} pays for no memory cell of this model: one takes "
            f"{budget / count:.2g} percent at photon.chunk_size={chunk_size} and "
            f"photon.memory_bits={bits}; raise the budget or photon.chunk_size, or set photon.memory_cells to []"
        )
    return min(int(count), len(memory_candidates(dense, photon)) * Shape.of(dense).kv_heads)


def memory_candidates(dense: PretrainedConfig, photon: PhotonSettings) -> list[int]:
    """Layers that can have a memory: neither at full attention, nor kept local by the family, nor recurrent."""
    windows = Shape.of(dense).windows
    local = {layer for layer, own in enumerate(windows) if own is not None} if None in windows else set()
    return [layer for layer in range(len(windows)) if layer not in {*local, *photon.full_attention_layers}]


def _spread(layers: list[int], heads: int, count: int) -> Cells:
    """`count` cells evenly over the upper half of `layers` (over all where they need more), the topmost among them."""
    for begin in (len(layers) // 2, 0):
        cells = [(layer, head) for layer in layers[begin:] for head in range(heads)]
        if len(cells) >= count:
            break
    found: Cells = {}
    for number in range(count):
        layer, head = cells[len(cells) - 1 - number * len(cells) // count]
        found.setdefault(layer, []).append(head)
    return {layer: sorted(found[layer]) for layer in sorted(found)}


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
