from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from photon_kernels import (
    Append,
    cache_append,
    gather_chunk_project,
    paged_decode_attention,
    window_decode_attention,
)


def call(op: str, backend: str, device: torch.device, requires_grad: bool = False) -> Tensor:
    q = torch.ones(2, 4, 1, 16, device=device, requires_grad=requires_grad)
    cache = torch.ones(2, 2, 5, 16, device=device)
    index = torch.tensor([3, 2], device=device)
    if op == "cache_append":
        slots = torch.zeros(2, 1, dtype=torch.long, device=device)
        cache_append([Append(q[:, :2], cache, index - 2, slots)], backend=backend)
        return cache
    if op == "window_decode":
        positions = torch.arange(5, device=device).expand(2, 5)
        return window_decode_attention(q, cache, cache, positions, index - 1, index[:, None], 1.0, backend=backend)
    if op == "paged_decode":
        return paged_decode_attention(q, cache, cache, index[:, None], 1.0, backend=backend)
    weight = torch.ones(8, 64, device=device)
    return gather_chunk_project(
        q[:, :, 0], torch.tensor([1], device=device), weight, weight.new_ones(()), backend=backend
    )


OPS = ["window_decode", "paged_decode", "chunker", "cache_append"]


@pytest.mark.parametrize("op", OPS)
def test_unknown_backend(op: str) -> None:
    with pytest.raises(ValueError, match="backend='cuda' is unknown; choose one of 'triton', 'torch'"):
        call(op, "cuda", torch.device("cpu"))


@pytest.mark.parametrize("op", OPS)
def test_triton_refuses_to_drop_gradients(op: str, device: torch.device) -> None:
    with pytest.raises(RuntimeError, match=r"torch\.no_grad\(\)"):
        call(op, "triton", device, requires_grad=True)
    with torch.no_grad():
        call(op, "triton", device, requires_grad=True)


@pytest.mark.parametrize("op", OPS[:3])
def test_torch_backend_has_gradients(op: str) -> None:
    assert call(op, "torch", torch.device("cpu"), requires_grad=True).requires_grad


@pytest.mark.parametrize("op", OPS)
def test_triton_on_the_cpu_needs_the_interpreter(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="tensors on cpu: .* TRITON_INTERPRET=1"):
        call(op, "triton", torch.device("cpu"))


def test_the_package_works_without_triton() -> None:
    program = """
import sys
sys.modules["triton"] = None  # as if it were not installed
import torch, photon_kernels
states, weight = torch.ones(2, 2, 4), torch.ones(3, 8)
arguments = states, torch.tensor([1]), weight, torch.tensor(0.5)
assert photon_kernels.gather_chunk_project(*arguments).tolist() == [[4.0] * 3]
try:
    photon_kernels.gather_chunk_project(*arguments, backend="triton")
except RuntimeError as error:
    print(error)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == 'backend="triton" needs the package triton; install it or use backend="torch"'
