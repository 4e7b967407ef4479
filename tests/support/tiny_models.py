"""Tiny models of both kinds by name, for what serves them all."""

from __future__ import annotations

from tiny import GRAFTS, photon_model
from tiny_hierarchical import HIERARCHIES, hierarchical_model
from transformers import PreTrainedModel

ALL = sorted([*GRAFTS, *HIERARCHIES])
# One of each kind of path; the others differ in numbers.
SOME = ["memory", "memory-full", "memory-apart", "memory-4-bits", "block-2", "stream-2-slots"]


def tiny_model(name: str, **changes) -> PreTrainedModel:
    """A shaken model in evaluation mode, fp32."""
    return photon_model(name, **changes) if name in GRAFTS else hierarchical_model(name, **changes)


def unit_tokens(model: PreTrainedModel) -> int:
    """Tokens under the largest unit: blocks of a paged cache are multiples of it."""
    return max([1, *(store.unit_tokens for store in model.new_cache().growing())])
