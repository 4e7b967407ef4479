"""The chunker of the rows whose chunk closes in this step: gather their states, concatenate, project."""

from __future__ import annotations

from torch import Tensor

from photon_kernels._backend import check_backend, check_integers, check_triton_inputs
from photon_kernels.chunker.naive import gather_chunk_project_naive

__all__ = ["gather_chunk_project", "gather_chunk_project_naive"]


def gather_chunk_project(states: Tensor, rows: Tensor, weight: Tensor, scale: Tensor, backend: str = "torch") -> Tensor:
    """``scale * concat(states[row, 0], ..., states[row, C - 1]) @ weight.T`` for the given rows only.

    Args:
        states: The open chunks' buffers ``[Bc, C, d]``.
        rows: Integer ``[n]``, the buffers to read, in any order; n may be 0.
        weight: ``[d_out, C * d]``, in the states' dtype.
        scale: Tensor of one element, in any floating dtype.
        backend: ``"torch"`` (any device, differentiable) or ``"triton"`` (GPU, forward only).

    Returns:
        ``[n, d_out]`` in the states' dtype. Sums are in float32; where that is not the states' dtype, the torch backend
        rounds once more, before it applies the scale.

    Raises:
        ValueError: Shapes or dtypes do not fit together, or the backend is unknown.
        RuntimeError: Triton cannot run on these inputs; the message says why.
    """
    check_backend(backend)
    if states.dim() != 3 or weight.dim() != 2 or weight.shape[1] != states.shape[1] * states.shape[2]:
        raise ValueError(
            f"expected states [Bc, C, d] and weight [d_out, C * d], got {tuple(states.shape)}, {tuple(weight.shape)}"
        )
    if states.dtype != weight.dtype:
        raise ValueError(f"states and weight must have one dtype, got {states.dtype} and {weight.dtype}")
    if scale.numel() != 1:
        raise ValueError(f"scale must be a single number, got {list(scale.shape)}")
    check_integers("rows", rows, rows.numel())
    if backend == "torch":
        return gather_chunk_project_naive(states, rows, weight, scale)
    check_triton_inputs(states, rows, weight, scale)
    from photon_kernels.chunker.triton import gather_chunk_project_triton

    return gather_chunk_project_triton(states, rows, weight, scale)
