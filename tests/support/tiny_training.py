"""Tiny runs of the training loop, shared by its tests and by the script that they launch on two processes."""

from __future__ import annotations

from typing import Any

import torch
from tiny import GRAFTS, VOCABULARY, base_config, photon_model, shake
from tiny_hierarchical import hierarchical_model
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from photon_train.config import LoraSettings, RunConfig, TrackingSettings, TrainSettings
from photon_train.data.packing import PackedDataset

SEQ_LEN = 24
PHOTON_MODELS = ("memory", "block-2")


def tiny_model(name: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A shaken Llama (`llama`), graft (a name of `tiny.GRAFTS`) or hierarchical model, fp32."""
    if name == "llama":
        settings = base_config(**changes)
        settings.pop("model_type")
        return shake(LlamaForCausalLM(LlamaConfig(**settings)), seed)
    if name in GRAFTS:
        return photon_model(name, seed=seed, **changes)
    return hierarchical_model(name, seed=seed, **changes)


def tiny_data(num_sequences: int, seed: int = 0, seq_len: int = SEQ_LEN, documents: bool = False) -> PackedDataset:
    """Sequences of mostly low ids, which is what can be learned, with an uneven share of filler.

    With `documents` they hold isolated documents: of any two sequences that follow each other, one holds many.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = 3 + (torch.rand(num_sequences, seq_len, generator=generator) ** 4 * (VOCABULARY - 3)).long()
    share = torch.rand(num_sequences, 1, generator=generator)
    filler = torch.rand(num_sequences, seq_len, generator=generator) < share
    starts = None
    if documents:
        often = 0.3 * (torch.arange(num_sequences)[:, None] % 2)
        starts = torch.rand(num_sequences, seq_len, generator=generator) < often
    return PackedDataset(ids.int(), filler, num_documents=num_sequences, starts=starts)


def tiny_run(lora: dict[str, Any] | None = None, **train: Any) -> RunConfig:
    """Six fp32 steps of a global batch of four sequences; `train` and `lora` override settings."""
    settings = {
        "max_steps": 6,
        "seq_len": SEQ_LEN,
        "batch_size": 4,
        "learning_rate": 1e-2,
        "new_modules_learning_rate": 1e-2,
        "weight_decay": 0.1,
        "warmup_steps": 2,
        "mixed_precision": "no",
        "eval_every": 3,
        "eval_sequences": 5,
        "log_every": 1,
        "save_every": 3,
    }
    return RunConfig(
        train=TrainSettings(**{**settings, **train}),
        lora=LoraSettings(**{"rank": 4, "alpha": 8, **(lora or {})}),
        tracking=TrackingSettings(tracker="none"),
    )


class Poison:
    """Spoils chosen optimiser steps of one process, as bad data or hardware would.

    ``nan`` makes the loss NaN; ``gradient`` leaves it and multiplies the gradient by a million. Give the object
    to `train` as `on_step`, so that it knows the step.
    """

    def __init__(self, model: PreTrainedModel, steps: dict[int, str], active: bool = True) -> None:
        self.steps, self.active, self.done = steps, active, 0
        model.register_forward_hook(self._hook)

    def __call__(self, step: int) -> None:
        self.done = step

    def _hook(self, module: torch.nn.Module, _: Any, output: Any) -> None:
        kind = self.steps.get(self.done + 1)
        if self.active and module.training and kind == "nan":
            output.logits = output.logits * torch.nan
        elif self.active and module.training and kind == "gradient":
            output.logits = output.logits.detach() + (output.logits - output.logits.detach()) * 1e6


def losses(history: list[dict[str, Any]], key: str = "train/loss") -> list[float]:
    """The values of `key` in the order of the steps."""
    return [record[key] for record in history if key in record]
