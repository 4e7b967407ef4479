"""Torch reference of the outputs over near and far keys."""

from __future__ import annotations

import torch
from torch import Tensor


def latent_outputs_naive(
    mixed: Tensor,
    mass: Tensor,
    lse: Tensor,
    heads: Tensor,
    value_map: Tensor,
    value_bias: Tensor,
    out: Tensor,
    out_lse: Tensor,
) -> None:
    """Arguments as in ``latent_outputs``."""
    cells = value_map.shape[1]
    precise = torch.promote_types(out.dtype, torch.float32)
    mixed, mass, value_map, value_bias = (part.to(precise) for part in (mixed, mass, value_map, value_bias))
    far = torch.einsum("nhgsc,shdc->nhgd", mixed.unflatten(1, (cells, -1)), value_map)
    far = (far + torch.einsum("nhgs,shd->nhgd", mass.unflatten(1, (cells, -1)), value_bias)).flatten(1, 2)
    near_lse = out_lse[:, heads]
    joint = torch.logaddexp(near_lse, lse)
    near_weight, far_weight = ((part - joint).exp().nan_to_num(0.0)[..., None] for part in (near_lse, lse))
    # Zeroed, not only weighted by zero: a head that sees no near key may hold anything.
    near = out[:, heads].to(precise).masked_fill(near_weight == 0.0, 0.0)
    out[:, heads] = (near * near_weight + far * far_weight).to(out.dtype)
    out_lse[:, heads] = joint
