"""Small hierarchical models with shaken weights, shared by the tests."""

from __future__ import annotations

from functools import partial
from typing import Any

import tiny
from tiny import shake

from photon_train.models import HierarchicalConfig, HierarchicalForCausalLM

base_config = partial(tiny.base_config, num_hidden_layers=2)


def _levels(*chunks: int, slots: tuple[int, ...], windows: tuple[int | None, ...] | None = None, layers: int = 2):
    windows = windows or (*(3,) * (len(chunks) - 1), None)
    return [
        {
            "chunk_size": chunk,
            "num_slots": num_slots,
            "encoder_layers": 1,
            "encoder_window": window,
            "decoder_layers": layers,
        }
        for chunk, num_slots, window in zip(chunks, slots, windows, strict=True)
    ]


# One entry per path through the model; every equivalence test runs on all of them.
HIERARCHIES: dict[str, dict[str, Any]] = {
    "block-1": {"levels": _levels(3, slots=(2,))},
    "block-1-window": {"levels": _levels(4, slots=(3,), windows=(2,))},
    "block-2": {"levels": _levels(3, 2, slots=(2, 2))},
    "block-2-one-slot": {"levels": _levels(2, 3, slots=(1, 1), windows=(None, None))},
    "block-2-thin": {"levels": _levels(2, 1, slots=(3, 1), windows=(1, 2))},
    "block-3": {"levels": _levels(2, 2, 2, slots=(2, 1, 3))},
    "stream-1": {"layout": "stream", "levels": _levels(3, slots=(2,)), "window": 5, "num_sinks": 2},
    "stream-1-long": {"layout": "stream", "levels": _levels(4, slots=(1,)), "window": 11, "num_sinks": 5},
    "stream-2": {"layout": "stream", "levels": _levels(2, 2, slots=(1, 1)), "window": 6},
    "stream-2-slots": {"layout": "stream", "levels": _levels(3, 2, slots=(2, 2)), "window": 7, "num_sinks": 1},
    "stream-3": {"layout": "stream", "levels": _levels(2, 2, 2, slots=(3, 1, 2)), "window": 9, "num_sinks": 4},
}


def hierarchical_config(name: str, model_type: str = "llama", **changes: Any) -> HierarchicalConfig:
    """The configuration `name` of `HIERARCHIES` on a tiny dense family."""
    return HierarchicalConfig(**{"base_config": base_config(model_type), **HIERARCHIES[name], **changes})


def hierarchical_model(name: str, model_type: str = "llama", seed: int = 0, **changes: Any) -> HierarchicalForCausalLM:
    """A shaken model in evaluation mode, fp32."""
    return shake(HierarchicalForCausalLM(hierarchical_config(name, model_type, **changes)), seed).eval()
