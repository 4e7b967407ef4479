"""Queries as latents are read: their rotation undone, and the map that unpacks keys folded into them."""

from __future__ import annotations

import torch
from torch import Tensor

from photon_kernels._backend import check_backend, check_integers, check_triton_inputs
from photon_kernels.latent_queries.naive import latent_queries_naive

__all__ = ["check_map", "latent_queries", "latent_queries_naive"]


def latent_queries(
    query: Tensor,
    heads: Tensor,
    key_map: Tensor,
    key_bias: Tensor,
    cosine: Tensor,
    sine: Tensor,
    is_interleaved: bool = False,
    backend: str = "torch",
) -> tuple[Tensor, Tensor]:
    """What ``latent_decode`` takes as ``folded`` and ``bias``.

    With q the query of a head without its rotation, ``folded[s, c] = sum_d q[d] * key_map[s, cell, d, c]`` and
    ``bias[s] = sum_d q[d] * key_bias[s, cell, d]``: the logit of token s under a unit is then linear in its latent.

    Args:
        query: Of all heads, one per row, ``[n, Hq, D]``, rotated.
        heads: Integer ``[H]``, the query heads that read latents, H / m of each cell, in the cells' order.
        key_map: ``[S, m, D, C]``, of the latent's numbers in order; any strides, but for the last dimension.
        key_bias: ``[S, m, D]``.
        cosine: ``[n or 1, Dr]``, of the rows' rotation; the first Dr dimensions of a head are rotated, 0 to D.
        sine: Like ``cosine``.
        is_interleaved: Whether dimensions 2i and 2i + 1 are rotated together, not i and i + Dr / 2.
        backend: ``"torch"`` (any device, differentiable) or ``"triton"`` (GPU, forward only, one launch).

    Returns:
        ``folded [n, H, S, C]`` of ``query``'s type and ``bias [n, H, S]``, float32.

    Raises:
        ValueError: Shapes or dtypes do not fit together, or the backend is unknown.
        RuntimeError: Triton cannot run on these inputs; the message says why.
    """
    check_backend(backend)
    if query.dim() != 3:
        raise ValueError(f"expected a query [n, Hq, D], got {tuple(query.shape)}")
    check_map("key_map", key_map, "key_bias", key_bias, heads, query)
    rotated = cosine.shape[-1]
    if cosine.shape != sine.shape or cosine.shape not in ((1, rotated), (query.shape[0], rotated)):
        raise ValueError(
            f"cosine and sine must be [{query.shape[0]} or 1, Dr], got {list(cosine.shape)}, {list(sine.shape)}"
        )
    if rotated > query.shape[2] or rotated % 2:
        raise ValueError(f"{rotated} dimensions of {query.shape[2]} cannot be rotated in pairs")
    arguments = query, heads, key_map, key_bias, cosine, sine, is_interleaved
    if backend == "torch":
        return latent_queries_naive(*arguments)
    check_triton_inputs(*arguments[:-1])
    from photon_kernels.latent_queries.triton import latent_queries_triton

    return latent_queries_triton(*arguments)


def check_map(name: str, matrix: Tensor, bias_name: str, bias: Tensor, heads: Tensor, states: Tensor) -> None:
    """Check a converter's map ``[S, m, D, C]`` and bias ``[S, m, D]`` against heads ``[H]`` and ``states [..., D]``.

    Raises:
        ValueError: they do not fit; the message gives their shapes.
    """
    if matrix.dim() != 4 or matrix.shape[2] != states.shape[-1] or matrix.dtype != states.dtype:
        raise ValueError(
            f"{name} must be {states.dtype} [S, m, {states.shape[-1]}, C], got {matrix.dtype} {list(matrix.shape)}"
        )
    if bias.shape != matrix.shape[:3]:
        raise ValueError(f"{bias_name} must be {list(matrix.shape[:3])}, got {list(bias.shape)}")
    if heads.dim() != 1 or heads.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"heads must be int32 or int64 [H], got {heads.dtype} {list(heads.shape)}")
    check_integers("heads", heads, len(heads))
    if not len(heads) or len(heads) % matrix.shape[1]:
        raise ValueError(f"{len(heads)} query heads cannot be shared out over {matrix.shape[1]} cells")
