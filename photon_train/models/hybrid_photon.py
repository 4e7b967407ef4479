"""Hybrids: layers with attention among recurrent ones, which read the columns of a batch one after the other.

Recurrent layers (short convolutions, gated delta nets) are the family's own, and so are their states in the cache. They
know no rows of different lengths: a state must have seen all of a row's tokens and nothing else. Without a cache rows
may end with padding, which nothing real reads; with one they begin with it, where it leaves a state as it is: at zero.
Packed documents become rows of their own in every layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers.modeling_outputs import ModelOutput

from .attention_photon import Segment
from .configuration_photon import PhotonConfig
from .documents_photon import Documents, Group
from .families_photon import RECURRENT
from .rows_photon import Rows


@dataclass
class PaddedSegment:
    """The segment of rows that begin with padding: attention takes them as rows that end with it.

    Attributes:
        segment: What the layer's attention does.
        order, place: As those of `Rows`, ``[B, T]``.
    """

    segment: Segment
    order: torch.Tensor
    place: torch.Tensor

    def attend(self, module, query, key, value, scale, softcap=None, sink_logits=None):
        rows = (_take(states, self.order) for states in (query, key, value))
        return _take(self.segment.attend(module, *rows, scale, softcap, sink_logits), self.place)


def _take(states: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """``[B, H, T, D]`` at the given columns of each row."""
    return states.gather(2, columns[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3]))


def has_padding_after_tokens(mask: torch.Tensor | None) -> bool:
    """Whether a row of an ``attention_mask [B, T]`` has a token with padding anywhere after it."""
    if mask is None or mask.dim() != 2:
        return False
    real = mask.bool()
    return bool((real[:, :-1] & ~real[:, 1:]).any())


def check_padding(config: PhotonConfig, mask: torch.Tensor | None, rows: Rows) -> None:
    """Check that the padding of a pass with a cache leaves states as they are.

    Raises:
        ValueError: for padding after a token, and any where the family's convolution has a bias on it.
    """
    if rows.valid is None:
        return
    starts = all(not had or new == rows.columns for had, new in zip(rows.host_past, rows.host_lengths, strict=True))
    if not starts or has_padding_after_tokens(mask):
        raise ValueError(
            f"the recurrent layers of a {config.base_model_type} model read padding that follows a token into the "
            "cache: pad on the left (padding_side='left'), or give use_cache=False"
        )
    if getattr(config, "conv_bias", False):
        raise ValueError(
            "a convolution with conv_bias=True reads padding into the cache: give rows of one length, or "
            "use_cache=False"
        )


def layer_masks(config: PhotonConfig, rows: Rows | None = None) -> dict[str, torch.Tensor | None]:
    """By kind of layer the ``attention_mask [B, T]`` that the family's stack hands down: recurrent layers read zeros
    where `rows` (if given) begin with padding, attention has `Segment` in its place."""
    real = None if rows is None else rows.place < rows.lengths[:, None]
    return {kind: real if kind in RECURRENT else None for kind in config.layer_types}


def run_documents(documents: Documents, embeds: torch.Tensor, run: Callable[[torch.Tensor, Group], ModelOutput]):
    """The output for packed ``embeds [B, T, d]``, each document computed as a row of its own.

    Args:
        documents: The documents of the batch.
        run: The stack, on the embedded rows of a group.
    """
    parts = documents.take_apart(embeds)
    found = [run(part, group) for part, group in zip(parts, documents.groups, strict=True)]
    out = found[0]
    out.last_hidden_state = documents.put_together([each.last_hidden_state for each in found])
    if out.get("hidden_states") is not None:
        by_layer = zip(*(each.hidden_states for each in found), strict=True)
        out.hidden_states = tuple(documents.put_together(list(states)) for states in by_layer)
    return out
