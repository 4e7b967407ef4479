"""Tiny hybrids: grafts on layers with attention among recurrent ones."""

from __future__ import annotations

from typing import Any

from tiny import photon_model
from tiny_dense import SPECIALS

from photon_train.models import PhotonForCausalLM

# By name: family, and what its configuration changes. Layers 1 and 3 have attention; one of each kind occurs.
HYBRIDS: dict[str, tuple[str, dict[str, Any]]] = {
    "convolutions": ("lfm2", {"memory_cells": {1: [1], 3: [0, 1]}}),
    "convolutions-full": ("lfm2", {"memory_cells": {1: [0]}, "full_attention_layers": [3], "conv_L_cache": 5}),
    "delta-nets": ("qwen3_5_text", {"memory_cells": {1: [0, 1]}, "full_attention_layers": [3]}),
}


def hybrid_model(name: str, **changes: Any) -> PhotonForCausalLM:
    """The model `name` of `HYBRIDS`, shaken, in evaluation mode, fp32."""
    family, own = HYBRIDS[name]
    return photon_model("memory", family, **{"num_hidden_layers": 4, **SPECIALS[family], **own, **changes})
