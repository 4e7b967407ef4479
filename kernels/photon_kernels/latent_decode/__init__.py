"""Decode attention over latents that are never unpacked: folded queries against a store of units, in blocks."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from photon_kernels._backend import check_backend, check_integers, check_rows, check_triton_inputs
from photon_kernels.latent_decode.naive import latent_decode_naive

__all__ = ["LatentMix", "latent_decode", "latent_decode_bytes", "latent_decode_naive"]


class LatentMix(NamedTuple):
    """What a softmax over the tokens under units leaves of latents.

    Attributes:
        mixed: ``[B, Hq, S, C]``, per head and token of a unit the weighted sum of latents (or their second halves).
        mass: float32 ``[B, Hq, S]``, the weights' sums; over a unit's tokens they add up to 1.
        lse: float32 ``[B, Hq]``, natural logarithm of the softmax denominator.

    A head that sees nothing has 0, 0 and -inf.
    """

    mixed: Tensor
    mass: Tensor
    lse: Tensor


def latent_decode(
    folded: Tensor,
    bias: Tensor,
    keys: Tensor,
    values: Tensor,
    visible: Tensor,
    scale: float,
    first_token: int = 0,
    rows: Tensor | None = None,
    block_table: Tensor | None = None,
    scales: tuple[Tensor, Tensor] | None = None,
    bits: int = 16,
    num_splits: int | None = None,
    backend: str = "torch",
) -> LatentMix:
    """Attend from one query per row and head to the tokens under the first units of a store.

    A unit is stored as a latent c of 2 * Hkv * D numbers, cut into the halves `keys` and `values` of Hkv heads. Token s
    of unit u has the logit ``scale * (folded[h, s] . c_u + bias[h, s])``, and each head's softmax goes over all tokens
    of all visible units: u < visible, and u * S + s >= first_token. Where keys and values were packed apart (C = Hkv *
    D), logits are products with the first halves alone, and sums those of the second.

    Args:
        folded: Queries times the map that unpacks keys, ``[B, Hq, S, C]``; C is 2 * Hkv * D, ordered (half, key head,
            dimension), or Hkv * D.
        bias: Queries times that map's bias, ``[B, Hq, S]``.
        keys: First halves, ``[Bc, Hkv, U, D]``; with ``block_table``, ``[blocks, Hkv, units per block, D]``. What a
            unit holds that no row sees (NaN included) has no influence.
        values: Second halves, like ``keys``.
        visible: Integer ``[B]``, units that each row sees, 0 to U.
        scale: Factor on the dot products, usually ``D ** -0.5``.
        first_token: Tokens before it are not seen (sinks, which the window holds).
        rows: Integer ``[B]``, the row of the store (of ``block_table``) that each row of queries reads; ``None``: its
            own.
        block_table: Optional integer ``[Br, W]``: unit u of row r is in block ``block_table[r, u // E]`` at ``u % E``.
            What the table holds beyond the units that a row sees is not read.
        scales: With `bits` below 16, of the two halves' codes: bf16, ``[Bc, Hkv, U, 1]`` or in blocks like ``keys``.
        bits: 16: the halves are numbers of ``folded``'s type. 8 or 4: they are codes, uint8 ``[..., D * bits / 8]``;
            code c stands for ``(c - (2 ** bits - 1) / 2) * scale``, and of 4 bits byte i holds the codes of numbers i
            (its low half) and D / 2 + i.
        num_splits: Parts into which the Triton backend cuts the sums of latents; ``None`` chooses.
        backend: ``"torch"`` (any device, differentiable) or ``"triton"`` (GPU, forward only).

    Raises:
        ValueError: Shapes or dtypes do not fit together, ``num_splits`` is not positive, or the backend is unknown.
        RuntimeError: Triton cannot run on these inputs; the message says why.
    """
    check_backend(backend)
    if folded.dim() != 4 or keys.dim() != 4 or keys.shape != values.shape:
        raise ValueError(
            f"expected folded [B, Hq, S, C] and keys, values [Bc, Hkv, U, D], got {tuple(folded.shape)}, "
            f"{tuple(keys.shape)}, {tuple(values.shape)}"
        )
    if bits not in (4, 8, 16) or (scales is None) != (bits == 16):
        raise ValueError(f"bits={bits} must be 16, or 8 or 4 with scales")
    head_dim = keys.shape[3] * (2 if bits == 4 else 1)
    width = 2 * keys.shape[1] * head_dim
    if folded.shape[3] not in (width, width // 2):
        raise ValueError(
            f"folded queries have width {folded.shape[3]}, the latents have {width}, their halves {width // 2}"
        )
    stored = folded.dtype if bits == 16 else torch.uint8
    if not keys.dtype == values.dtype == stored:
        raise ValueError(f"keys and values must be {stored}, got {keys.dtype}, {values.dtype}")
    for each in scales or ():
        if each.shape != (*keys.shape[:3], 1):
            raise ValueError(f"scales must be {[*keys.shape[:3], 1]}, got {list(each.shape)}")
    if bias.shape != folded.shape[:3]:
        raise ValueError(f"bias must be {list(folded.shape[:3])}, got {list(bias.shape)}")
    if block_table is not None:
        check_integers("block_table", block_table, block_table.shape[0], *block_table.shape[1:2])
    check_rows(rows, folded.shape[0], keys.shape[0] if block_table is None else block_table.shape[0])
    check_integers("visible", visible, folded.shape[0])
    if num_splits is not None and num_splits < 1:
        raise ValueError(f"num_splits must be at least 1, got {num_splits}")
    arguments = folded, bias, keys, values, visible, scale, first_token, rows, block_table, scales, bits
    if backend == "torch":
        return LatentMix(*latent_decode_naive(*arguments))
    check_triton_inputs(folded, bias, keys, values, visible, rows, block_table, *(scales or ()))
    from photon_kernels.latent_decode.triton import latent_decode_triton

    return LatentMix(*latent_decode_triton(*arguments, num_splits))


def latent_decode_bytes(
    batch: int, num_heads: int, chunk_size: int, num_units: int, head_dim: int, element_size: int
) -> int:
    """Bytes that the Triton backend holds beside its inputs and its result while it runs, as far as they grow.

    A weight for every row, query head and token under U units (of whole blocks), and in float32 two numbers per tile of
    units. What the sums of latents take does not depend on U.
    """
    from photon_kernels.latent_decode.triton import choose_latent_config

    queries = num_heads * chunk_size
    num_tiles = -(-num_units // choose_latent_config(queries, head_dim, element_size).block_n)
    return batch * queries * (num_units * element_size + num_tiles * 2 * 4)
