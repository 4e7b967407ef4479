"""Losses over the vocabulary in chunks of positions, so that the logits of a whole sequence are never in memory.

For a vocabulary of 128k and 32k tokens the logits in fp32, with their gradient, would be 32 GiB. Here the model returns
what its head would read, and head and loss are taken chunk by chunk; the backward pass computes a chunk's logits again.
"""

from __future__ import annotations

import importlib.util

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from photon_train.models.softmax_photon import capped

IGNORED = -100
# Elements of one chunk's logits: 64 MiB in fp32, enough rows to fill a GPU even for the largest vocabularies.
CHUNK_ELEMENTS = 2**24


def num_chunks(positions: int, vocab_size: int) -> int:
    """Chunks that `positions` are taken in."""
    return max(1, -(-positions * vocab_size // CHUNK_ELEMENTS))


def kl_sum(student: torch.Tensor, teacher: torch.Tensor, is_target: torch.Tensor, temperature: float) -> torch.Tensor:
    """Sum over targets of temperature^2 x KL(teacher || student) (Hinton et al., arXiv 1503.02531).

    Args:
        student, teacher: Logits, ``[positions, vocabulary]``.
        is_target: ``[positions]``.
        temperature: Softmax temperature of both; the squared factor keeps the gradient's size.
    """
    student = F.log_softmax(student.float() / temperature, dim=-1)
    teacher = F.log_softmax(teacher.float() / temperature, dim=-1)
    per_token = F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)
    return per_token.masked_fill(~is_target, 0.0).sum() * temperature**2


def _losses_of_chunk(states, targets, head, teacher_states, teacher_head, temperature, bound) -> torch.Tensor:
    logits = capped(head(states), bound)
    ce = F.cross_entropy(logits.float(), targets, ignore_index=IGNORED, reduction="sum")
    if teacher_states is None:
        return torch.stack([ce, torch.zeros_like(ce)])
    with torch.no_grad():
        teacher_logits = capped(teacher_head(teacher_states), bound)
    return torch.stack([ce, kl_sum(logits, teacher_logits, targets.ne(IGNORED), temperature)])


def vocabulary_losses(
    head: nn.Module,
    states: torch.Tensor,
    labels: torch.Tensor,
    teacher: tuple[nn.Module, torch.Tensor] | None = None,
    temperature: float = 1.0,
    chunks: int | None = None,
    bound: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums over the target tokens of the cross-entropy and of the distillation term.

    Args:
        head: Maps states to logits.
        states: ``[batch, tokens, d]``; position i predicts token i + 1.
        labels: ``[batch, tokens]``, unshifted, -100 is masked.
        teacher: Head and states of the dense model, without gradient; None leaves the second sum at 0.
        temperature: See `kl_sum`.
        chunks: Pieces that the positions are taken in; None: `num_chunks`, the same on every process.
        bound: Of the logits, the teacher's too (`logit_bound`).

    Returns:
        Two fp32 scalars.
    """
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED).flatten()
    states = states.flatten(0, 1)
    if (
        teacher is None
        and chunks is None
        and bound is None
        and (fused := fused_cross_entropy(head, states)) is not None
    ):
        ce = fused(head.weight, states, targets, head.bias)
        return ce.float(), torch.zeros_like(ce, dtype=torch.float32)
    teacher_head, teacher_states = (None, None) if teacher is None else (teacher[0], teacher[1].flatten(0, 1))
    chunks = chunks or num_chunks(len(targets), _vocab_size(head))
    sums = states.new_zeros(2, dtype=torch.float32)
    # `chunk` and not slices: its backward writes all pieces' gradients into one tensor.
    pieces = zip(
        states.chunk(chunks),
        targets.chunk(chunks),
        [None] * chunks if teacher_states is None else teacher_states.chunk(chunks),
        strict=False,
    )
    for piece, target, taught in pieces:
        arguments = (piece, target, head, taught, teacher_head, temperature, bound)
        if chunks > 1 and torch.is_grad_enabled():
            sums = sums + checkpoint(_losses_of_chunk, *arguments, use_reentrant=False)
        else:
            sums = sums + _losses_of_chunk(*arguments)
    return sums[0], sums[1]


def _vocab_size(head: nn.Module) -> int:
    return getattr(head, "out_features", 1)


def fused_cross_entropy(head: nn.Module, states: torch.Tensor):
    """liger-kernel's linear layer and cross-entropy in one, where it can run; else None.

    That is on a GPU, with the package installed, for a plain linear head whose weight is whole (not sharded, without an
    adapter, of the states' type).
    """
    usable = (
        type(head) is nn.Linear
        and states.is_cuda
        and not hasattr(head.weight, "ds_id")
        and head.weight.dtype == states.dtype
        and importlib.util.find_spec("liger_kernel") is not None
    )
    if not usable:
        return None
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORED, reduction="sum")
