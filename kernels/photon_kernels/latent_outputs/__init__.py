"""Sums of latents turned into values, and the softmax over near and far keys joined from its two parts."""

from __future__ import annotations

from torch import Tensor

from photon_kernels._backend import check_backend, check_triton_inputs
from photon_kernels.latent_outputs.naive import latent_outputs_naive
from photon_kernels.latent_queries import check_map

__all__ = ["latent_outputs", "latent_outputs_naive"]


def latent_outputs(
    mixed: Tensor,
    mass: Tensor,
    lse: Tensor,
    heads: Tensor,
    value_map: Tensor,
    value_bias: Tensor,
    out: Tensor,
    out_lse: Tensor,
    backend: str = "torch",
) -> None:
    """Add what ``latent_decode`` found to the attention over near keys, in place.

    A head's far output is ``sum_s value_map[s, cell] @ mixed[s] + mass[s] * value_bias[s, cell]``. It and the near
    output are weighted by ``exp(lse - log(exp(lse) + exp(near lse)))``; where neither sees a key the output is 0.

    Args:
        mixed: ``[n, H, S, C]``, mass: ``[n, H, S]``, lse: ``[n, H]``: the fields of a ``LatentMix``.
        heads: Integer ``[H]``, the query heads that they belong to, H / m of each cell, in the cells' order.
        value_map: ``[S, m, D, C]``; any strides, but for the last dimension.
        value_bias: ``[S, m, D]``.
        out: Attention of all heads over the near keys, ``[n, Hq, D]``; those of ``heads`` are replaced.
        out_lse: Its log-sum-exp, float32 ``[n, Hq]``, likewise.
        backend: ``"torch"`` (any device) or ``"triton"`` (GPU, one launch).

    Raises:
        ValueError: Shapes or dtypes do not fit together, or the backend is unknown.
        RuntimeError: Triton cannot run on these inputs; the message says why.
    """
    check_backend(backend)
    if out.dim() != 3 or out_lse.shape != out.shape[:2]:
        raise ValueError(f"expected out [n, Hq, D] and out_lse [n, Hq], got {list(out.shape)}, {list(out_lse.shape)}")
    check_map("value_map", value_map, "value_bias", value_bias, heads, out)
    wanted = (out.shape[0], len(heads), value_map.shape[0])
    if mixed.shape != (*wanted, value_map.shape[3]) or mass.shape != wanted or lse.shape != wanted[:2]:
        raise ValueError(
            f"mixed, mass and lse must be {[*wanted, value_map.shape[3]]}, {list(wanted)} and {list(wanted[:2])}, got "
            f"{list(mixed.shape)}, {list(mass.shape)}, {list(lse.shape)}"
        )
    arguments = mixed, mass, lse, heads, value_map, value_bias, out, out_lse
    if backend == "torch":
        latent_outputs_naive(*arguments)
        return
    check_triton_inputs(*arguments)
    from photon_kernels.latent_outputs.triton import latent_outputs_triton

    latent_outputs_triton(*arguments)
