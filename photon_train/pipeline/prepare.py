"""Before anything is computed: the dense checkpoint, the plan, the estimate and the text."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from photon_train.accounting import Estimate, estimate
from photon_train.config import RunConfig
from photon_train.conversion.families import dense_tensors
from photon_train.conversion.plan import ConversionPlan, make_plan
from photon_train.conversion.presets import layer_map, photon_config
from photon_train.conversion.safetensors_io import TensorInfo
from photon_train.conversion.source import DenseCheckpoint
from photon_train.data.corpora import read_documents, split_documents
from photon_train.data.packing import PackedDataset, check_tokenizer, pack
from photon_train.data.pretrain import PretrainSettings
from photon_train.errors import PhotonError
from photon_train.models import PhotonConfig

# Text of a hub data set that is read, in characters per token needed: more than any tokenizer's average.
_CHARACTERS_PER_TOKEN = 8


@dataclass
class Conversion:
    """A checkpoint and what is to become of it."""

    checkpoint: DenseCheckpoint
    config: PhotonConfig
    plan: ConversionPlan
    estimate: Estimate


def demo_checkpoint() -> DenseCheckpoint:
    """The demo's dense model as configuration alone, for an estimate before it is trained."""
    config = PretrainSettings().model_config(eos_id=0)
    tensors = {name: TensorInfo(shape, torch.float32, None) for name, shape in dense_tensors(config).items()}
    return DenseCheckpoint(Path("demo"), config, tensors)


def plan_conversion(checkpoint: DenseCheckpoint, config: RunConfig, num_processes: int) -> Conversion:
    """Plan and estimate; no weight is read.

    Raises:
        PhotonError: for settings that the preset or the model cannot serve.
    """
    photon = photon_config(checkpoint.config, config)
    plan = make_plan(checkpoint, photon, layer_map(checkpoint.config, config), config.export.dtype, config.seed)
    stage, offload = _deepspeed_stage()
    numbers = estimate(
        checkpoint.config,
        photon,
        seq_len=config.train.seq_len,
        batch_size=config.train.batch_size,
        rank=config.lora.rank,
        target_modules=config.lora.target_modules,
        dtype_bytes=plan.torch_dtype.itemsize,
        zero_stage=stage,
        num_processes=num_processes,
        offload=offload,
        gradient_checkpointing=config.train.gradient_checkpointing,
    )
    return Conversion(checkpoint, photon, plan, numbers)


def show_conversion(conversion: Conversion) -> None:
    """Print the plan and the estimate."""
    console = Console()
    console.print(conversion.plan.table())
    console.print(conversion.estimate.table())


def _deepspeed_stage() -> tuple[int, bool]:
    """ZeRO stage and offload that `accelerate launch` was given, from the environment it sets."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() != "true":
        return 0, False
    stage = int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))
    return stage, os.environ.get("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "none") not in ("none", "")


@dataclass
class Text:
    """Packed text and the tokenizer that made it."""

    tokenizer: PreTrainedTokenizerBase
    train: PackedDataset
    held_out: PackedDataset

    def summary(self) -> dict[str, Any]:
        """Counts for the report."""
        return {
            "train_tokens": self.train.num_tokens,
            "train_documents": self.train.num_documents,
            "held_out_tokens": self.held_out.num_tokens,
            "packing_efficiency": self.train.packing_efficiency,
        }


def load_tokenizer(directory: Path, vocab_size: int) -> PreTrainedTokenizerBase:
    """The tokenizer beside a checkpoint.

    Raises:
        PhotonError: if there is none, it does not fit the vocabulary, or it has no end-of-text token.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory)
    except (OSError, ValueError, KeyError) as error:
        raise PhotonError(
            f"{directory}: no tokenizer could be read ({str(error).splitlines()[0]}): put tokenizer.json and "
            "tokenizer_config.json beside the weights"
        ) from error
    check_tokenizer(tokenizer, vocab_size)
    if tokenizer.eos_token_id is None:
        raise PhotonError(f"{directory}: the tokenizer has no eos_token: name one in tokenizer_config.json")
    return tokenizer


def load_text(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, span: int, num_processes: int, progress: bool
) -> Text:
    """Read, split and pack the text of a run.

    Args:
        span: Tokens under one top unit, to whose multiples documents are aligned.

    Raises:
        PhotonError: for text that is missing, unreadable or too little.
    """
    train = config.train
    needed = train.max_steps * train.batch_size * train.gradient_accumulation_steps * num_processes * train.seq_len
    is_local = config.data is None or Path(config.data).exists()
    documents = read_documents(config.data, config.dataset, None if is_local else needed * _CHARACTERS_PER_TOKEN)
    train_documents, held_out = split_documents(documents, config.dataset.held_out_fraction)
    align, end = span if config.dataset.align_documents else 1, tokenizer.eos_token_id
    return Text(
        tokenizer,
        pack(train_documents, tokenizer, train.seq_len, align, end, progress=progress),
        pack(held_out, tokenizer, train.seq_len, align, end, pad_last=True, progress=progress),
    )
