"""RMSNorm and SwiGLU of the families' layers by liger-kernel: fused on a GPU where it is installed, torch elsewhere.

Which of the two runs is decided call by call, so that a model may be moved after `fuse_layers`. Rotary embeddings stay
with transformers: liger rotates in place, and the memory of units rotates one tensor as query and as key.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from .families_photon import LLAMA_LIKE, family
from .flex_photon import outside_checkpoints

logger = logging.getLogger(__name__)


def fuse_layers(model: nn.Module) -> int:
    """Let the norms and gated MLPs of `model` (its adapters included) run fused wherever they meet a GPU.

    Returns:
        Number of modules; 0 if liger-kernel is not installed.
    """
    if importlib.util.find_spec("liger_kernel") is None:
        return 0
    norms = tuple(family(name).norm for name in LLAMA_LIKE)
    fused = 0
    for module in model.modules():
        if isinstance(module, norms):
            module.forward = partial(_norm, module)
        elif _is_swiglu(module):
            module.forward = partial(_gated, module)
        else:
            continue
        fused += 1
    return fused


def _is_swiglu(module: nn.Module) -> bool:
    if not all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")):
        return False
    sample = torch.linspace(-3, 3, 7)
    return torch.allclose(module.act_fn(sample), F.silu(sample))


def _norm(module: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    # Of mixed types (weights in fp32 under autocast), liger's result has another type than torch's.
    if hidden.dtype == module.weight.dtype and _usable(hidden):
        return _fused_norm(hidden, module.weight, module.variance_epsilon)
    return type(module).forward(module, hidden)


def _gated(module: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    if _usable(hidden):
        return module.down_proj(_fused_gate(module.gate_proj(hidden), module.up_proj(hidden)))
    return type(module).forward(module, hidden)


def _usable(hidden: torch.Tensor) -> bool:
    return hidden.is_cuda and works(hidden.device, hidden.dtype)


def _fused_norm(hidden: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    from liger_kernel.ops import LigerRMSNormFunction

    # Not in place: what reads the norm's output may need the gradient that liger would overwrite.
    return LigerRMSNormFunction.apply(hidden, weight, epsilon, 0.0, "llama", False)


def _fused_gate(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    from liger_kernel.ops import LigerSiLUMulFunction

    return LigerSiLUMulFunction.apply(gate, up)


@functools.cache
def works(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether liger's kernels run here and give what torch gives, forward and backward; tried once, logged if not."""
    generator = torch.Generator().manual_seed(0)
    hidden, other, upstream = (torch.randn(5, 96, generator=generator).to(device, dtype) for _ in range(3))
    weight = (1 + 0.1 * torch.randn(96, generator=generator)).to(device, dtype)
    leaves = [each.requires_grad_() for each in (hidden, other, weight)]

    def results(norm, gate, leaves, upstream) -> list[torch.Tensor]:
        out = gate(norm(leaves[0], leaves[2]), leaves[1])
        return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]

    def norm_of_torch(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(hidden, hidden.shape[-1:], weight, 1e-5)

    with torch.autocast(device.type, enabled=False), torch.enable_grad(), outside_checkpoints():
        try:
            found = results(partial(_fused_norm, epsilon=1e-5), _fused_gate, leaves, upstream)
        except Exception as error:  # whatever the compiler or an unknown version says: torch is always there
            logger.warning("liger-kernel is not used: it failed on %s (%s)", device, str(error).split("\n")[0])
            return False
        precise = [leaf.detach().double().requires_grad_() for leaf in leaves]
        expected = results(norm_of_torch, lambda gate, up: F.silu(gate) * up, precise, upstream.double())
    error = max(float((a.double() - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True))
    if not error < max(1e-5, 8 * torch.finfo(dtype).eps):
        logger.warning("liger-kernel is not used: it is off by %.1e on %s", error, device)
        return False
    return True
