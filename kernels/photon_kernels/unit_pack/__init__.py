"""Pack the unit that leaves the window: from the ring's keys and values to what the memory stores, in one launch."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from photon_kernels._backend import check_backend, check_integers, check_triton_inputs
from photon_kernels.unit_pack.naive import unit_pack_naive

__all__ = ["unit_pack", "unit_pack_naive"]


def unit_pack(
    keys: Tensor,
    values: Tensor,
    rows: Tensor,
    slots: Tensor,
    heads: Tensor,
    cosine: Tensor,
    sine: Tensor,
    weights: tuple[Tensor, Tensor],
    biases: tuple[Tensor, Tensor],
    targets: Sequence[Tensor],
    units: Tensor,
    block_table: Tensor | None = None,
    bits: int = 16,
    is_interleaved: bool = False,
    backend: str = "torch",
) -> None:
    """Pack S tokens of some key heads of each row into a latent, and store it, in place.

    The keys' rotation is undone. Tokens, halves (keys, then values) and heads joined in this order are multiplied with
    the chunker's matrix; each half of the result is cut into m vectors, one per head, and those are stored as they are
    or as codes of 8 or 4 bits, as ``latent_decode`` reads them, with a scale each: a vector's largest magnitude over
    ``2 ** (bits - 1)``.

    Args:
        keys: What a ring holds, ``[R, Hkv, N, D]``, rotated; values: the same shape.
        rows: Integer ``[n]``, the row of the ring (of ``block_table`` or the targets) of each row of the step.
        slots: Integer ``[n, S]``, where the ring holds the unit's tokens.
        heads: Integer ``[m]``, the key heads.
        cosine: ``[n or 1, S, Dr]``, of the tokens' rotation; the first Dr dimensions of a head are rotated, 0 to D.
        sine: Like ``cosine``.
        weights: The chunker's rows that give the first halves (keys) and the second (values), ``[m * D, I]`` each; I is
            ``S * 2 * m * D``, or ``S * m * D`` where each half is packed from its own.
        biases: Likewise, ``[m * D]`` each.
        targets: First and second halves of a store, ``[Rt, m, U, size]``, with ``block_table``, ``[blocks, m, units per
            block, size]``; then, with `bits` below 16, their scales, bf16 ``[..., 1]``. Codes are uint8.
        units: Integer ``[n]``, which unit of its row it is; rows with a negative one are skipped.
        block_table: Optional integer ``[Br, W]``: unit u of row r is in block ``block_table[r, u // E]`` at ``u % E``.
        bits: 16, 8 or 4.
        is_interleaved: Whether dimensions 2i and 2i + 1 are rotated together, not i and i + Dr / 2.
        backend: ``"torch"`` (any device) or ``"triton"`` (GPU, one launch).

    Raises:
        ValueError: Shapes or dtypes do not fit together, or the backend is unknown.
        RuntimeError: Triton cannot run on these inputs; the message says why.
    """
    check_backend(backend)
    if keys.dim() != 4 or keys.shape != values.shape or keys.shape[3] % 2:
        raise ValueError(
            f"expected keys and values [R, Hkv, N, D] of even D, got {list(keys.shape)}, {list(values.shape)}"
        )
    count, width = rows.shape[0], heads.shape[0] * keys.shape[3]
    check_integers("rows", rows, count)
    check_integers("slots", slots, count, *slots.shape[1:2])
    check_integers("heads", heads, *heads.shape[:1])
    check_integers("units", units, count)
    tokens, rotated = slots.shape[1], cosine.shape[-1]
    if cosine.shape != sine.shape or cosine.shape not in ((1, tokens, rotated), (count, tokens, rotated)):
        raise ValueError(
            f"cosine and sine must be [{count} or 1, {tokens}, Dr], got {list(cosine.shape)}, {list(sine.shape)}"
        )
    if rotated > keys.shape[3] or rotated % 2:
        raise ValueError(f"{rotated} dimensions of {keys.shape[3]} cannot be rotated in pairs")
    for weight, bias in zip(weights, biases, strict=True):
        if weight.shape not in ((width, tokens * width), (width, 2 * tokens * width)) or bias.shape != (width,):
            raise ValueError(
                f"weights must be [{width}, {tokens * width} or {2 * tokens * width}] with biases [{width}], got "
                f"{list(weight.shape)} with {list(bias.shape)}"
            )
        if weight.dtype != keys.dtype:
            raise ValueError(f"weights must be {keys.dtype} as the keys, got {weight.dtype}")
    if bits not in (4, 8, 16) or len(targets) != (2 if bits == 16 else 4):
        raise ValueError(f"bits={bits} must be 16 with two targets, or 8 or 4 with four, got {len(targets)}")
    size = keys.shape[3] // (2 if bits == 4 else 1)
    for target in targets[:2]:
        if target.dim() != 4 or target.shape[1] != len(heads) or target.shape[3] != size:
            raise ValueError(f"targets must be [.., {len(heads)}, U, {size}], got {list(target.shape)}")
    if block_table is not None:
        check_integers("block_table", block_table, *block_table.shape[:2])
    arguments = keys, values, rows, slots, heads, cosine, sine, weights, biases, targets, units, block_table, bits
    if backend == "torch":
        unit_pack_naive(*arguments, is_interleaved)
        return
    check_triton_inputs(keys, values, rows, slots, heads, cosine, sine, *weights, *biases, *targets, units, block_table)
    from photon_kernels.unit_pack.triton import unit_pack_triton

    unit_pack_triton(*arguments, is_interleaved)
