"""The training objective: cross-entropy, distillation from the dense model, recursive consistency.

Every part is normalised by counts of the *whole* optimiser step (all micro-batches of all processes), so that
gradient accumulation and data parallelism give the gradient of one big batch, whatever the labels mask.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import nn
from torch.utils.checkpoint import checkpoint

from photon_train.config import ConsistencySettings, DistillSettings
from photon_train.errors import PhotonError
from photon_train.training.lora import base_model

IGNORED = -100


@dataclass
class LossParts:
    """Parts of the loss of one optimiser step, as numbers.

    Attributes:
        total: What was minimised.
        ce: Mean cross-entropy per target token (nats).
        distill: Mean KL(dense || student) per target token, times temperature squared; None without a teacher.
        consistency: Mean 1 - cos of the recursive-consistency loss; None where the model gives none.
    """

    total: float
    ce: float
    distill: float | None = None
    consistency: float | None = None


def num_target_tokens(labels: torch.Tensor) -> torch.Tensor:
    """Tokens that `labels` [batch, tokens] asks a causal LM to predict: the first of each row is never one."""
    return labels[:, 1:].ne(IGNORED).sum()


def _kl_of_chunk(
    student: torch.Tensor, teacher: torch.Tensor, is_target: torch.Tensor, temperature: float
) -> torch.Tensor:
    student = F.log_softmax(student.float() / temperature, dim=-1)
    teacher = F.log_softmax(teacher.float() / temperature, dim=-1)
    per_token = F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)
    return per_token.masked_fill(~is_target, 0.0).sum()


def distillation_kl(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    labels: torch.Tensor,
    temperature: float = 1.0,
    chunk_size: int = 256,
) -> torch.Tensor:
    """Sum over the target tokens of temperature^2 x KL(teacher || student) (Hinton et al., arXiv 1503.02531).

    Positions are taken in chunks that are recomputed in the backward pass: beside the logits themselves at most
    one chunk is held in fp32.

    Args:
        student_logits: [batch, tokens, vocabulary]; position i predicts token i + 1.
        teacher_logits: The same shape; no gradient flows to it.
        labels: [batch, tokens], unshifted, -100 is masked.
        temperature: Softmax temperature of both; the squared factor keeps the gradient's size.
        chunk_size: Positions per chunk.
    """
    is_target = F.pad(labels[:, 1:], (0, 1), value=IGNORED).ne(IGNORED)
    total = student_logits.new_zeros((), dtype=torch.float32)
    # `split` and not slices: its backward writes all chunks' gradients into one tensor.
    for student, teacher, mask in zip(
        student_logits.split(chunk_size, dim=1),
        teacher_logits.detach().split(chunk_size, dim=1),
        is_target.split(chunk_size, dim=1),
        strict=True,
    ):
        total = total + checkpoint(_kl_of_chunk, student, teacher, mask, temperature, use_reentrant=False)
    return total * temperature**2


class TrainingObjective(nn.Module):
    """A causal LM and its losses as one module, so that wrappers (DDP, DeepSpeed, autocast) see scalars only.

    The full-size logits never leave `forward`: accelerate would return them upcast to fp32.

    Args:
        model: The student, with or without adapters.
        distill: Weight and temperature of the distillation.
        consistency: Weight of the recursive consistency; written to the model's config, whose forward applies it.
        teacher: A separate dense model. Unset, the student's own dense function is run with adapters off.

    Raises:
        PhotonError: if distillation is asked for and there is no teacher, or it has another vocabulary.
    """

    def __init__(
        self,
        model: nn.Module,
        distill: DistillSettings | None = None,
        consistency: ConsistencySettings | None = None,
        teacher: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.distill = distill or DistillSettings()
        base = base_model(model)
        # DeepSpeed's automatic bucket sizes read the hidden size here.
        self.config = base.config
        self.consistency_weight = 0.0
        if hasattr(base.config, "consistency_weight"):
            if consistency is not None:
                base.config.consistency_weight = consistency.weight
            self.consistency_weight = base.config.consistency_weight
        self._teacher = (self._check_teacher(teacher),) if self.distill.weight else ()

    def _check_teacher(self, teacher: nn.Module | None) -> nn.Module | None:
        if teacher is not None:
            if teacher.config.vocab_size != self.config.vocab_size:
                raise PhotonError(
                    f"distill: the dense model has {teacher.config.vocab_size} tokens and the trained model "
                    f"{self.config.vocab_size}; distil from the checkpoint that was converted"
                )
            return teacher.requires_grad_(False).eval()
        supports = getattr(base_model(self.model), "supports_dense_forward", None)
        if not (isinstance(self.model, PeftModel) and callable(supports) and supports()):
            raise PhotonError(
                "distill.weight is set but the trained model does not hold the dense one (that takes a preset that "
                "keeps every dense layer, such as graft, and lora.rank > 0): pass the dense model as teacher, or set "
                "distill.weight=0"
            )
        return None

    @torch.no_grad()
    def _teacher_logits(self, **inputs: torch.Tensor) -> torch.Tensor:
        # `_teacher` is a tuple: as a submodule the teacher would be saved and sharded with the student.
        (teacher,) = self._teacher
        if teacher is not None:
            if teacher.device != inputs["input_ids"].device:
                teacher.to(inputs["input_ids"].device)
            return teacher(**inputs, use_cache=False).logits
        base = base_model(self.model)
        was_training = base.training
        base.eval()
        with self.model.disable_adapter():
            logits = base(**inputs, use_cache=False, as_dense=True).logits
        base.train(was_training)
        return logits

    def forward(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        target_tokens: torch.Tensor,
        sequences: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """This micro-batch's share of the loss.

        Args:
            input_ids: [batch, tokens].
            labels: [batch, tokens], unshifted; -100 is masked.
            target_tokens: Integer scalar; what token sums are divided by: the target tokens of the optimiser step
                (1 gives sums).
            sequences: Integer scalar; the sequences of the optimiser step.
            attention_mask: [batch, tokens] or None.

        Returns:
            ``total`` (with gradient), ``ce`` and, where there is one, ``distill`` and ``consistency`` (without):
            scalars whose sums over micro-batches and processes are the optimiser step's.
        """
        inputs = {"input_ids": input_ids}
        if attention_mask is not None:
            inputs["attention_mask"] = attention_mask
        count = num_target_tokens(labels)
        # A micro-batch without targets would make the model's mean 0/0; any labels do, since they weigh nothing.
        output = self.model(**inputs, labels=torch.where(count == 0, input_ids, labels), use_cache=False)
        ce, parts = output.loss, {}
        total = torch.zeros_like(ce)
        consistency = getattr(output, "consistency_loss", None)
        if self.training and consistency is not None and self.consistency_weight:
            ce = ce - self.consistency_weight * consistency
            consistency = consistency * (input_ids.shape[0] / sequences)
            total = total + self.consistency_weight * consistency
            parts["consistency"] = consistency.detach()
        ce = ce * (count / target_tokens)
        total = total + ce
        parts["ce"] = ce.detach()
        if self.training and self.distill.weight:
            teacher_logits = self._teacher_logits(**inputs)
            kl = distillation_kl(output.logits, teacher_logits, labels, self.distill.temperature) / target_tokens
            total = total + self.distill.weight * kl
            parts["distill"] = kl.detach()
        return {"total": total, **parts}
