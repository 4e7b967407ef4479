"""Parameters, FLOPs and cache bytes of a PHOTON model in closed form, before any weight is loaded.

A *PHOTON configuration* is any object with the attributes of `PhotonConfig` or `HierarchicalConfig`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from photon_train.accounting.graft import Graft
from photon_train.accounting.hierarchical import Hierarchical
from photon_train.linears import EXPERTS, FUSED

# By the configuration's model_type.
_COSTS = {"photon": Graft, "photon_hierarchical": Hierarchical}


def costs_of(photon: Any) -> Graft | Hierarchical:
    """The formulas for a PHOTON configuration."""
    return _COSTS[photon.model_type](photon)


@dataclass(frozen=True)
class CacheBytes:
    """Bytes that decoding keeps for one sequence.

    Attributes:
        growing: What grows with the text.
        constant: What is bounded.
    """

    growing: int
    constant: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.growing + self.constant


def new_parameters(photon: Any) -> int:
    """Parameters of the modules that no dense model has."""
    return costs_of(photon).new_parameters


def photon_parameters(photon: Any) -> int:
    """Parameters of a PHOTON model; a tied head counts once."""
    costs = costs_of(photon)
    # A hierarchy has more layers than the dense model.
    layers = costs.shape.all_layers + (costs.num_layers - costs.shape.layers) * costs.shape.layer
    return costs.shape.shared + layers + costs.new_parameters


def lora_parameters(photon: Any, rank: int, target_modules: Iterable[str] | None = None) -> int:
    """Parameters of rank-`rank` adapters on the named linear layers of all stacks.

    None names every layer's; ``lm_head`` and ``experts`` count if named.
    """
    costs = costs_of(photon)
    shape, mixer = costs.shape, costs.shape.mixer
    targets = set(shape.linear_names if target_modules is None else target_modules)
    held = shape.modules
    targets |= {whole for whole, parts in FUSED.items() if targets & set(parts)}  # one adapter for all that is stacked
    per_layer = sum(sum(sizes) for name, sizes in held.items() if name in targets)
    if EXPERTS in targets:
        per_layer += sum(count * (rows + columns) for count, rows, columns in shape.mixture.held.values())
    other = 0
    if mixer is not None:
        other = sum(sum(sizes) for name, sizes in mixer.linears.items() if name in targets)
        other -= sum(sum(sizes) for name, sizes in shape.attention.items() if name in targets)
    head = shape.vocab + shape.hidden if "lm_head" in targets else 0
    return rank * (costs.num_layers * per_layer + len(shape.recurrent) * other + head)


def trainable_parameters(photon: Any, rank: int, target_modules: Iterable[str] | None = None) -> int:
    """Parameters that fine-tuning changes: adapters and new modules, or everything at rank 0."""
    if rank == 0:
        return photon_parameters(photon)
    return lora_parameters(photon, rank, target_modules) + new_parameters(photon)


def cache_bytes(photon: Any, tokens: int, dtype_bytes: int = 2) -> CacheBytes:
    """Bytes of the model's cache for one sequence of `tokens`, exactly."""
    return CacheBytes(*costs_of(photon).cache(tokens, dtype_bytes))


def growing_bytes_per_token(photon: Any, dtype_bytes: int = 2) -> float:
    """Slope of `cache_bytes` over the tokens."""
    return costs_of(photon).growing_per_token(dtype_bytes)


def layer_positions(photon: Any) -> float:
    """Positions that go through a decoder layer per token; the dense model has its number of layers."""
    return costs_of(photon).layer_positions


def photon_flops(photon: Any, context: int) -> float:
    """Forward FLOPs of the token after `context` tokens."""
    return costs_of(photon).flops(context)
