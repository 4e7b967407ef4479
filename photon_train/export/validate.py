"""Is what was written what was trained?"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM

from photon_train.accounting import costs_of
from photon_train.checkpoints import read_config
from photon_train.errors import PhotonError
from photon_train.manifest import verify_manifest

# DESIGN 3.4: two computations of one function in fp32.
MAX_DIFFERENCE = 2e-4


@dataclass(frozen=True)
class ExportCheck:
    """What `validate_export` found.

    Attributes:
        parameters: Parameters of the exported model; a tied head counts once.
        dtype: Type of its weights.
        max_logit_difference: Largest difference to the reference's logits; None without a reference.
        kl: Mean KL(reference || export) per position, in nats; None without a reference.
    """

    parameters: int
    dtype: str
    max_logit_difference: float | None = None
    kl: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Every number, for JSON."""
        return asdict(self)


@torch.no_grad()
def validate_export(
    directory: str | os.PathLike[str],
    reference_model: nn.Module | None = None,
    *,
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> ExportCheck:
    """Check the files of an export against its manifest, load it, and compare it with the model it was made from.

    Both models run on two random sequences that reach three units beyond the window. In fp32 their logits must agree
    up to 2e-4 (relative to the largest logit where that exceeds 1); in 16 bit the difference is only reported.

    Args:
        directory: What `save.export_model` wrote.
        reference_model: The trained model, merged or with its adapters, whole (not sharded). It is left as it was.
        device: Where the exported model runs.
        seed: Seed of the sequences.

    Raises:
        PhotonError: if a file is missing or changed, weights are missing, logits are not finite, or an fp32 export
            computes another function than an fp32 reference.
    """
    directory = Path(directory)
    verify_manifest(directory)
    config = read_config(directory)
    model, loading = AutoModelForCausalLM.from_pretrained(
        directory, config=config, dtype="auto", output_loading_info=True
    )
    if problems := [key for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if loading.get(key)]:
        raise PhotonError(f"{directory}: the weights do not fit config.json ({', '.join(problems)}): export again")
    model = model.to(device).eval()
    generator = torch.Generator().manual_seed(seed)
    length = (config.window or 0) + 3 * costs_of(config).unit + 3
    tokens = torch.randint(config.vocab_size, (2, length), generator=generator)
    logits = _logits(model, tokens)
    if not bool(logits.isfinite().all()):
        raise PhotonError(f"{directory}: the exported model's logits are not finite: set export.dtype to a wider type")
    found = {"parameters": model.num_parameters(), "dtype": str(model.dtype).removeprefix("torch.")}
    if reference_model is None:
        return ExportCheck(**found)
    expected = _logits(reference_model, tokens)
    difference = (logits - expected).abs().max().item()
    types = {parameter.dtype for part in (model, reference_model) for parameter in part.parameters()}
    allowed = MAX_DIFFERENCE * max(1.0, expected.abs().max().item())
    if types == {torch.float32} and difference > allowed:
        raise PhotonError(
            f"{directory}: the exported model's logits differ from the trained model's by {difference:.2g} "
            f"(allowed: {allowed:.2g}): export again"
        )
    kl = F.kl_div(logits.log_softmax(-1), expected.log_softmax(-1), log_target=True, reduction="none").sum(-1).mean()
    return ExportCheck(**found, max_logit_difference=difference, kl=kl.item())


def _logits(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Logits in fp32 on the CPU, without dropout."""
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    logits = model(input_ids=tokens.to(device), use_cache=False).logits.float().cpu()
    model.train(was_training)
    return logits
