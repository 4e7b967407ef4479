"""The training objective: cross-entropy, distillation from the dense model, recursive consistency.

Every part is normalised by counts of the *whole* optimiser step (all micro-batches of all processes), so that
gradient accumulation and data parallelism give the gradient of one big batch, whatever the labels mask.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from photon_train.config import ConsistencySettings, DistillSettings
from photon_train.errors import PhotonError
from photon_train.logits import headless, logit_bound
from photon_train.training.heads import IGNORED, vocabulary_losses
from photon_train.training.lora import base_model


@dataclass
class LossParts:
    """Parts of the loss of one optimiser step, as numbers.

    Attributes:
        total: What was minimised.
        ce: Mean cross-entropy per target token (nats).
        distill: Mean KL(dense || student) per target token, times temperature squared; None where it has no weight.
        distill_hidden: Mean relative squared error of the last hidden states per target token (`hidden_error`); None
            where it has no weight.
        consistency: Mean 1 - cos of the recursive-consistency loss; None where the model gives none.
    """

    total: float
    ce: float
    distill: float | None = None
    distill_hidden: float | None = None
    consistency: float | None = None


def num_target_tokens(labels: torch.Tensor) -> torch.Tensor:
    """Tokens that `labels` [batch, tokens] asks a causal LM to predict: the first of each row is never one."""
    return labels[:, 1:].ne(IGNORED).sum()


def hidden_error(student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sum over the target tokens of ``|student - teacher|^2 / |teacher|^2``.

    Relative, so that one weight serves models whose final norms have other scales.

    Args:
        student, teacher: What the heads read, ``[batch, tokens, d]``; position i predicts token i + 1.
        labels: ``[batch, tokens]``, unshifted, -100 is masked.

    Returns:
        An fp32 scalar.
    """
    # By norms: what autograd then keeps is the difference, in the states' own type.
    error = torch.linalg.vector_norm(student - teacher, dim=-1, dtype=torch.float32).square()
    size = torch.linalg.vector_norm(teacher, dim=-1, dtype=torch.float32).square()
    per_token = error[:, :-1] / size[:, :-1].clamp(min=torch.finfo(torch.float32).tiny)
    return per_token.masked_fill(labels[:, 1:].eq(IGNORED), 0.0).sum()


class TrainingObjective(nn.Module):
    """A causal LM and its losses as one module, so that wrappers (DDP, DeepSpeed, autocast) see scalars only.

    Logits never leave `forward`, and those of a whole sequence never exist (`heads`).

    Args:
        model: The student, with or without adapters.
        distill: Weights and temperature of the distillation.
        consistency: Weight of the recursive consistency; written to the model's config, whose forward applies it.
        teacher: A separate dense model. Unset, the student's own dense function is run with adapters off.

    Raises:
        PhotonError: if distillation is asked for and there is no teacher, or it has another vocabulary (for hidden
            states: another hidden size).
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
        self._teacher = (self._check_teacher(teacher),) if self.distill.is_on else ()

    def _check_teacher(self, teacher: nn.Module | None) -> nn.Module | None:
        if teacher is not None:
            if teacher.config.vocab_size != self.config.vocab_size:
                raise PhotonError(
                    f"distill: the dense model has {teacher.config.vocab_size} tokens and the trained model "
                    f"{self.config.vocab_size}; distil from the checkpoint that was converted"
                )
            if self.distill.hidden_weight and teacher.config.hidden_size != self.config.hidden_size:
                raise PhotonError(
                    f"distill.hidden_weight: a state of the dense model has {teacher.config.hidden_size} entries, one "
                    f"of the trained model {self.config.hidden_size}; distil from the checkpoint that was converted"
                )
            return teacher.requires_grad_(False).eval()
        if not (isinstance(self.model, PeftModel) and getattr(base_model(self.model), "holds_dense_model", False)):
            raise PhotonError(
                "distill.weight or distill.hidden_weight is set but the trained model does not hold the dense one "
                "(that takes preset graft and lora.rank > 0): pass the dense model as teacher, or set both to 0"
            )
        return None

    @torch.no_grad()
    def _teacher_states(self, **inputs: torch.Tensor) -> tuple[nn.Module, torch.Tensor]:
        """The dense model's head and what it reads."""
        # `_teacher` is a tuple: as a submodule the teacher would be saved and sharded with the student.
        (teacher,) = self._teacher
        if teacher is not None:
            if teacher.device != inputs["input_ids"].device:
                teacher.to(inputs["input_ids"].device)
            with headless(teacher):
                return teacher.get_output_embeddings(), teacher(**inputs, use_cache=False).logits
        base = base_model(self.model)
        was_training = base.training
        base.eval()
        with self.model.disable_adapter(), headless(base):
            states = base(**inputs, use_cache=False, as_dense=True).logits
        base.train(was_training)
        head = base.get_output_embeddings()
        return head.get_base_layer() if isinstance(head, BaseTunerLayer) else head, states

    def forward(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        target_tokens: torch.Tensor,
        sequences: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """This micro-batch's share of the loss.

        Args:
            input_ids: [batch, tokens].
            labels: [batch, tokens], unshifted; -100 is masked.
            target_tokens: Integer scalar; what token sums are divided by: the target tokens of the optimiser step
                (1 gives sums).
            sequences: Integer scalar; the sequences of the optimiser step.
            attention_mask: [batch, tokens] or None.
            position_ids: [batch, tokens] or None; documents start where they start again at 0, for the teacher too.

        Returns:
            ``total`` (with gradient), ``ce`` and, where there is one, ``distill``, ``distill_hidden`` and
            ``consistency`` (without): scalars whose sums over micro-batches and processes are the optimiser step's.
        """
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        inputs = {name: tensor for name, tensor in given.items() if tensor is not None}
        base = base_model(self.model)
        with headless(base):
            output = self.model(**inputs, use_cache=False)
        teacher = self._teacher_states(**inputs) if self.training and self.distill.is_on else None
        head, temperature = base.get_output_embeddings(), self.distill.temperature
        taught = teacher if self.distill.weight else None
        ce, kl = vocabulary_losses(head, output.logits, labels, taught, temperature, bound=logit_bound(base.config))
        ce = ce / target_tokens
        total = self.distill.ce_weight * ce
        parts = {"ce": ce.detach()}
        consistency = getattr(output, "consistency_loss", None)
        if self.training and consistency is not None and self.consistency_weight:
            consistency = consistency * (input_ids.shape[0] / sequences)
            total = total + self.consistency_weight * consistency
            parts["consistency"] = consistency.detach()
        if taught is not None:
            kl = kl / target_tokens
            total = total + self.distill.weight * kl
            parts["distill"] = kl.detach()
        if teacher is not None and self.distill.hidden_weight:
            error = hidden_error(output.logits, teacher[1], labels) / target_tokens
            total = total + self.distill.hidden_weight * error
            parts["distill_hidden"] = error.detach()
        return {"total": total, **parts}
