"""Dense families that cannot be converted, and why: for the error that meets them, and for the documentation."""

from __future__ import annotations

import difflib
from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True)
class Unsupported:
    """Families that share a reason.

    Attributes:
        model_types: Their ``model_type``.
        models: Published models, for the documentation.
        reason: What their layers do that PHOTON's attention cannot stand in for.
        needs: What it would take.
    """

    model_types: tuple[str, ...]
    models: str
    reason: str
    needs: str


_MAMBA = "most of its layers are Mamba-2, whose sizes and padding are not described here"
_SIZES = "a mixer in photon_train/layouts.py, as lfm2 and qwen3_5_text have"
_MIXED = "layers of two kinds of MLP in the registries"
_LATENT = "its attention is multi-head latent attention: the cache holds a latent, not keys and values by head"
_ABSORBED = "memory units packed from the latents"

UNSUPPORTED = (
    Unsupported(
        ("qwen3_next", "qwen3_5_moe", "qwen3_5_moe_text"),
        "Qwen3-Next, Qwen 3.5 (MoE)",
        "its layers have a shared expert beside the routed ones",
        "the shared expert's tensors in the registries, as qwen3_5_text has the rest",
    ),
    Unsupported(("lfm2_moe",), "LFM2 8B-A1B", "only its first layers have one MLP, the others experts", _MIXED),
    Unsupported(("granitemoehybrid",), "Granite 4 (hybrid)", _MAMBA, _SIZES),
    Unsupported(("nemotron_h",), "Nemotron-H", f"{_MAMBA}, and its layers hold one block each, not two", _SIZES),
    Unsupported(("kimi_linear",), "Kimi Linear", "its attention layers use latent attention", _ABSORBED),
    Unsupported(("deepseek_v2", "deepseek_v3"), "DeepSeek V2, V3, R1", _LATENT, _ABSORBED),
    Unsupported(("minicpm3",), "MiniCPM3", _LATENT, _ABSORBED),
    Unsupported(
        ("hunyuan_v1_dense",),
        "Hunyuan dense",
        "it normalises queries and keys after their rotation, which then cannot be undone as far keys need it",
        "far keys that carry the norm's weights into the frame before the rotation",
    ),
    Unsupported(
        ("gemma3", "mistral3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "lfm2_vl", "llama4", "gemma4"),
        "Gemma 3 4B to 27B, Mistral Small 3.1, Qwen-VL, Qwen 3.5, LFM2-VL, Llama 4",
        "it reads images beside text",
        "the language model alone: load it with transformers and save that part with save_pretrained",
    ),
    Unsupported(
        ("gpt2", "gpt_neox", "opt", "bloom", "falcon"),
        "GPT-2, GPT-NeoX, OPT, BLOOM, Falcon",
        "its modules are not named and shaped as Llama's (no rotation, or one matrix for queries, keys and values)",
        "a conversion to Llama's layout",
    ),
)


def find(model_type: str | None) -> Unsupported | None:
    """What is known about a family that cannot be converted."""
    return next((entry for entry in UNSUPPORTED if model_type in entry.model_types), None)


def refusal(model_type: str | None, supported: Collection[str]) -> str:
    """One line for a family that cannot be converted: why and what it would take, or the nearest supported one.

    Args:
        model_type: Of its ``config.json``.
        supported: The families that can be converted.
    """
    names = sorted(supported)
    known = find(model_type)
    if known is not None:
        why = f": {known.reason}; it would take {known.needs}"
    else:
        nearest = difflib.get_close_matches(str(model_type), names, n=1, cutoff=0.5)
        why = (
            f"; the nearest supported one is {nearest[0]}: if its layers compute the same, set model_type to it and "
            "name tensors as it does; else it needs an entry in the registries"
            if nearest
            else "; it would take an entry in the registries (docs/families.md)"
        )
    return f"model_type {model_type!r} cannot be converted{why}; supported families: {', '.join(names)}"
