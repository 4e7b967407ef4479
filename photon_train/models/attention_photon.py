"""Attention of PHOTON models: one segment of new tokens per row, over what the cache holds of earlier ones.

The families' attention layers call `photon_attention` through transformers' attention interface; a list of *segments*,
one per layer, handed down as a keyword argument says which keys each query sees. The same segments serve training (no
cache), prefill (many tokens after a past) and decoding (one token). At one token per row the backend `triton` replaces
the operations by kernels.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from .stores_photon import GrowingStore, RingStore, SlotMapping

ATTENTION_NAME = "photon"
BACKENDS = ("torch", "triton")


def load_kernels():
    """The optional kernel package.

    Raises:
        ImportError: if it is not installed; the message names the package to install.
    """
    try:
        import photon_kernels
    except ImportError as error:
        raise ImportError(
            "backend 'triton' needs the photon_kernels package: install photon-train[serve], or use backend 'torch'"
        ) from error
    return photon_kernels


class Segment(Protocol):
    """What a layer's attention does with the new elements of a pass."""

    def attend(
        self,
        module: torch.nn.Module,
        query,
        key,
        value,
        scale: float,
        softcap: float | None = None,
        sink_logits: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend with ``query [B, Hq, T, D]`` to the new ``key, value [B, Hkv, T, D]`` and the cache; store them.

        Args:
            module: The layer's attention module; its ``layer_idx`` is the layer.
            scale: Factor on the dot products.
            softcap: Soft bound of the scores (`softmax_photon.capped`), or None.
            sink_logits: One per query head, ``[Hq]``, in every softmax's denominator (`softmax_photon.with_sink`).

        Returns:
            ``[B, Hq, T, D]``.
        """


def photon_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    photon_segments: list[Segment] | None = None,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """Entry of transformers' attention interface: hand the layer's queries and keys to its segment.

    Args:
        query: ``[B, Hq, T, D]``, rotated; key, value: ``[B, Hkv, T, D]``.
        s_aux: What transformers calls the sink logits, ``[Hq]``.

    Returns:
        ``([B, T, Hq, D], None)``.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    # Under autocast the rotation leaves queries and keys in fp32 while values are bf16.
    query, key = query.to(value.dtype), key.to(value.dtype)
    out = photon_segments[module.layer_idx].attend(module, query, key, value, scale, softcap, s_aux)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION_NAME, photon_attention)


def sdpa(query, key, value, scale: float, mask: torch.Tensor | None = None, causal: bool = False) -> torch.Tensor:
    """`F.scaled_dot_product_attention` with grouped-query heads: ``[B, Hq, T, D]`` against ``[B, Hkv, K, D]``."""
    groups = query.shape[1] // key.shape[1]
    if mask is not None and groups > 1 and query.is_cuda:
        # With a mask and grouped heads no fused CUDA kernel is chosen, and all scores would be in memory at once.
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped
    )


def unrotate(
    states: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor], is_interleaved: bool = False
) -> torch.Tensor:
    """Undo the rotation of queries or keys ``[B, H, E, D]``; norms stay.

    Args:
        rotary: Cosine and sine, ``[B or 1, E, D]`` each; of fewer dimensions than D where heads are rotated in part, of
            none where they are not rotated.
        is_interleaved: Whether dimensions 2i and 2i + 1 are rotated together, not i and i + D / 2.
    """
    cosine, sine = (part.unsqueeze(1) for part in rotary)
    size = cosine.shape[-1]
    if not size:
        return states
    turned, rest = states[..., :size], states[..., size:]
    if is_interleaved:
        crossed = torch.stack([-turned[..., 1::2], turned[..., ::2]], dim=-1).flatten(-2)
    else:
        first, second = turned.chunk(2, dim=-1)
        crossed = torch.cat([-second, first], dim=-1)
    turned = turned * cosine - crossed * sine
    return torch.cat([turned, rest], dim=-1).to(states.dtype) if rest.shape[-1] else turned.to(states.dtype)


class NewElements:
    """The new elements of a pass, consecutive in every row's sequence, and where they go.

    Args:
        batch: B, rows of the pass.
        index: Sequence index of each new element, ``[B, T]``, or ``[1, T]`` where all rows agree (which is cheaper).
        base: The first index of all rows on the host, where they agree; else None.
        valid: Which elements are real, ``[B, T]``; None: all. The others follow them.
        rows: Rows of the cache, ``[B]``; None: all, in order.
        has_past: Whether any row has elements in the cache.
        backend: `torch` or `triton` (used at one element per row).
        varies: Whether the rows are documents, whose number and length differ from pass to pass and between the
            processes of a training.
    """

    def __init__(
        self,
        batch: int,
        index: torch.Tensor,
        base: int | None = None,
        valid: torch.Tensor | None = None,
        rows: torch.Tensor | None = None,
        has_past: bool = False,
        backend: str = "torch",
        varies: bool = False,
    ) -> None:
        self.batch, self.index, self.base, self.valid, self.rows = batch, index, base, valid, rows
        self.has_past, self.backend, self.varies = has_past, backend, varies
        self._rings: dict[int, tuple[torch.Tensor, SlotMapping]] = {}

    @property
    def length(self) -> int:
        """T."""
        return self.index.shape[1]

    @property
    def kernel_rows(self) -> torch.Tensor:
        """Rows of the cache, ``[B]``, for kernels."""
        return torch.arange(self.batch, device=self.index.device) if self.rows is None else self.rows

    def slot_mapping(self, store: RingStore | GrowingStore) -> SlotMapping:
        """Where the new elements go; of more than a ring holds, the last ones and the sinks."""
        keep = torch.ones_like(self.index, dtype=torch.bool) if self.valid is None else self.valid
        slots = self.index
        if isinstance(store, RingStore):
            slots = store.slot(self.index)
            last = self.index[:, -1:] if self.valid is None else self.index[:, :1] + self.valid.sum(1, True) - 1
            keep = keep & ((self.index > last - store.ring_size) | (self.index < store.num_sinks))
        if self.length == 1 and self.valid is None and (keep.shape[0] > 1 or self.backend == "triton"):
            batch = torch.arange(self.batch, device=keep.device)
            return SlotMapping(self.rows, torch.zeros_like(batch), slots[:, 0].expand(self.batch), batch, True)
        if keep.shape[0] == 1:
            columns = torch.arange(self.length, device=self.index.device)
            if self.length > 1:
                columns = columns[keep[0]]
            return SlotMapping(self.rows, columns, slots[0, columns])
        batch, columns = keep.nonzero(as_tuple=True)
        return SlotMapping(self.rows, columns, slots.expand(keep.shape)[batch, columns], batch)

    def enter(self, ring: RingStore) -> tuple[torch.Tensor, SlotMapping]:
        """Let `ring` know of the new elements, once for all its layers: what it had before, and their slots."""
        if id(ring) not in self._rings:
            key_index, slot_mapping = ring.read_index(self.rows), self.slot_mapping(ring)
            slot_mapping.put(ring.index, self.index.expand(self.batch, -1))
            self._rings[id(ring)] = key_index[:1] if self.index.shape[0] == 1 else key_index, slot_mapping
        return self._rings[id(ring)]

    def append(
        self, store: RingStore | GrowingStore, layer: int, slot_mapping: SlotMapping, *new: torch.Tensor
    ) -> None:
        """Store ``new [B, heads, T, size]``, one per tensor of the store, at one element per row by the backend."""
        if self.backend != "triton" or slot_mapping.batch is None:
            store.write(layer, slot_mapping, *new)
            return
        kernels = load_kernels()
        *stored, block_table = store.operands(layer)
        slots = slot_mapping.slots[:, None]
        appends: dict[torch.dtype, list] = {}
        for states, to in zip(new, stored, strict=True):
            append = kernels.Append(slot_mapping.take(states), to, slot_mapping.cache_rows, slots, block_table)
            appends.setdefault(to.dtype, []).append(append)  # one launch takes tensors of one type
        for each in appends.values():
            kernels.cache_append(each, backend="triton")
