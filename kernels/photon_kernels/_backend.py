"""What every operation does before it runs: choose a backend and check that its inputs fit together."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

BACKENDS = ("triton", "torch")


def check_backend(backend: str) -> None:
    """Reject an unknown backend name.

    Raises:
        ValueError: ``backend`` is not one of ``BACKENDS``.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is unknown; choose one of {', '.join(map(repr, BACKENDS))}")


def check_attention_shapes(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Check queries ``[B, Hq, Q, D]`` against a cache ``[Bc, Hkv, N, D]``.

    Raises:
        ValueError: ranks, shapes or dtypes do not fit together; the message gives them.
    """
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape:
        raise ValueError(
            f"expected q [B, Hq, Q, D] and k, v [Bc, Hkv, N, D], got {tuple(q.shape)}, {tuple(k.shape)}, "
            f"{tuple(v.shape)}"
        )
    if q.shape[3] != k.shape[3]:
        raise ValueError(f"q has head dimension {q.shape[3]}, the cache has {k.shape[3]}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads cannot be shared out over {k.shape[1]} key heads")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must have one dtype, got {q.dtype}, {k.dtype}, {v.dtype}")


def check_rows(rows: Tensor | None, batch: int, cache_rows: int) -> None:
    """Check the row index ``[B]``, without which query row b reads cache row b.

    Raises:
        ValueError: it does not fit, or is missing where the numbers of rows differ.
    """
    if rows is not None:
        check_integers("rows", rows, batch)
    elif cache_rows != batch:
        raise ValueError(f"{batch} rows of queries, but {cache_rows} cache rows: say with rows= which one each reads")


def check_integers(name: str, tensor: Tensor, *shape: int) -> None:
    """Check that an index tensor holds integers and has the given shape.

    Raises:
        ValueError: it has not.
    """
    if tensor.shape != shape or tensor.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name} must be int32 or int64 {list(shape)}, got {tensor.dtype} {list(tensor.shape)}")


def check_triton_inputs(*tensors: Tensor | None) -> None:
    """Check that Triton can run on these tensors, and that no gradient is expected from a forward-only kernel.

    Raises:
        RuntimeError: Triton is missing; the tensors lie on the CPU and its interpreter is off; or one of them
            requires a gradient while gradients are being recorded.
    """
    try:
        from triton import knobs
    except ImportError as error:
        raise RuntimeError('backend="triton" needs the package triton; install it or use backend="torch"') from error
    given = [tensor for tensor in tensors if tensor is not None]
    if len({tensor.device for tensor in given}) > 1:
        raise RuntimeError(f"the inputs lie on several devices: {sorted({str(tensor.device) for tensor in given})}")
    if not given[0].is_cuda and not knobs.runtime.interpret:
        raise RuntimeError(
            f'backend="triton" got tensors on {given[0].device}: move them to a GPU, use backend="torch", or set '
            "TRITON_INTERPRET=1 before Python starts to run the kernels slowly on the CPU"
        )
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given):
        raise RuntimeError(
            'backend="triton" computes no gradients: call it under torch.no_grad() or use backend="torch"'
        )


def current_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Context in which the tensor's GPU is the current one: Triton launches on the current device only."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def with_dense_rows(tensor: Tensor) -> Tensor:
    """The tensor itself where its last dimension is contiguous, a copy otherwise."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def next_power_of_2(value: int) -> int:
    """Smallest power of two that is not below ``value`` (at least 1)."""
    return 1 << max(value - 1, 0).bit_length()
