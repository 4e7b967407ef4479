"""Pretraining of small dense Llamas: the one that the demo converts, and those of quality studies."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from photon_train.data.loader import batches
from photon_train.data.packing import Sequences
from photon_train.data.progress import progress_bar

END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True)
class PretrainSettings:
    """The recipe of a small dense model, by default the demo's; a change of any value makes another model.

    Attributes:
        vocab_size: Entries of the byte-level BPE tokenizer.
        hidden_size, num_layers, num_heads, num_kv_heads, intermediate_size: Shape of the Llama.
        max_positions: Longest context the config allows.
        held_out_fraction: Share of the corpus (by file) that neither the tokenizer nor the model sees.
        seq_len: Tokens per training sequence.
        batch_size: Sequences per step.
        steps: Optimiser steps.
        learning_rate: Peak learning rate; linear warm-up, then a cosine to zero.
        warmup_steps: Steps of the warm-up.
        weight_decay: AdamW weight decay of matrices.
        seed: Seed of the initial weights and of the data order.
    """

    vocab_size: int = 4096
    hidden_size: int = 256
    num_layers: int = 6
    num_heads: int = 8
    num_kv_heads: int = 4
    intermediate_size: int = 704
    max_positions: int = 2048
    held_out_fraction: float = 0.05
    seq_len: int = 512
    batch_size: int = 2
    steps: int = 80
    learning_rate: float = 3e-3
    warmup_steps: int = 10
    weight_decay: float = 0.1
    seed: int = 0

    @classmethod
    def for_machine(cls) -> PretrainSettings:
        """The default recipe, six times as long where bf16 is native: about two minutes on two cores either way."""
        settings = cls()
        native = fast_dtype(torch.device("cuda" if torch.cuda.is_available() else "cpu")) == torch.bfloat16
        return replace(settings, steps=6 * settings.steps) if native else settings

    def model_config(self, eos_id: int) -> LlamaConfig:
        """The Llama's configuration."""
        return LlamaConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_kv_heads,
            intermediate_size=self.intermediate_size,
            max_position_embeddings=self.max_positions,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=eos_id,
            pad_token_id=eos_id,
        )


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer (any text can be encoded) with `<|endoftext|>` as end and padding."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT)


def fast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the hardware multiplies it natively, else float32.

    A CPU without such instructions emulates bfloat16 some 40 times slower than float32.
    """
    if device.type == "cuda":
        return torch.bfloat16
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # torch < 2.11 cannot tell
    native = any(capabilities.get(name) for name in ("amx_bf16", "avx512_bf16", "bf16"))
    return torch.bfloat16 if native else torch.float32


@dataclass(frozen=True)
class Stage:
    """A part of a pretraining: `steps` optimiser steps of `batch_size` sequences of `dataset`."""

    dataset: Sequences
    batch_size: int
    steps: int


def pretrain(
    settings: PretrainSettings,
    stages: Sequence[Stage],
    eos_id: int,
    progress: bool = True,
    on_step: Callable[[int, LlamaForCausalLM], None] | None = None,
) -> LlamaForCausalLM:
    """Train a Llama from scratch, stage after stage under one schedule; the result is in float32 on the CPU.

    Runs on a GPU if there is one. The number of steps is fixed, so a slower machine takes longer and gets the same
    model (to rounding).

    Args:
        settings: The model and the schedule; `steps`, `batch_size` and `seq_len` are the stages' own.
        stages: What to train on.
        eos_id: Token that ends a text.
        progress: Show the loss, the speed and the remaining time.
        on_step: Called after every optimiser step with the number of steps done and the model.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = fast_dtype(device)
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        model = LlamaForCausalLM(settings.model_config(eos_id)).to(device)
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    total = sum(stage.steps for stage in stages)
    optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.95), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, settings.warmup_steps, total))
    data = (
        batch
        for stage in stages
        for (batch,) in islice(batches(stage.dataset, settings.seed, stage.batch_size), stage.steps)
    )
    model.train()
    detail = f"of {total} steps  loss {{task.fields[loss]:.3f}}  {{task.fields[rate]:,.0f}} tokens/s"
    with progress_bar(progress, detail) as bar:
        task = bar.add_task("pretraining", total=total, loss=math.nan, rate=0.0)
        for step, batch in enumerate(data, start=1):
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
                loss = model(**{name: rows.to(device) for name, rows in batch.items()}, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            rate = batch["input_ids"].numel() * (bar.tasks[task].speed or 0.0)
            bar.update(task, advance=1, loss=loss.item(), rate=rate)
            if on_step is not None:
                on_step(step, model)
    return model.eval().cpu()


def _rate(step: int, warmup_steps: int, total: int) -> float:
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, total - warmup_steps)))
