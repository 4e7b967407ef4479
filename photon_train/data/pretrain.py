"""A short pretraining of a small dense Llama: the model that the demo converts."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from photon_train.data.loader import batches
from photon_train.data.packing import IGNORED_LABEL, PackedDataset
from photon_train.data.progress import progress_bar

END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True)
class DemoSettings:
    """The recipe of the demo's dense model; a change of any value makes another model.

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
    def for_machine(cls) -> DemoSettings:
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


def pretrain(settings: DemoSettings, dataset: PackedDataset, eos_id: int, progress: bool = True) -> LlamaForCausalLM:
    """Train a Llama from scratch for `settings.steps` steps; the result is in float32 on the CPU.

    Runs on a GPU if there is one. The number of steps is fixed, so a slower machine takes longer and gets the same
    model (to rounding).
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
    optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.95), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, settings))
    tokens_per_step = settings.batch_size * settings.seq_len
    steps = islice(batches(dataset, settings.seed, settings.batch_size), settings.steps)
    model.train()
    detail = f"of {settings.steps} steps  loss {{task.fields[loss]:.3f}}  {{task.fields[rate]:,.0f}} tokens/s"
    with progress_bar(progress, detail) as bar:
        task = bar.add_task("pretraining", total=settings.steps, loss=math.nan, rate=0.0)
        for (batch,) in steps:
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
                loss = model(**{name: rows.to(device) for name, rows in batch.items()}, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            rate = tokens_per_step * (bar.tasks[task].speed or 0.0)
            bar.update(task, advance=1, loss=loss.item(), rate=rate)
    return model.eval().cpu()


@torch.no_grad()
def cross_entropy(model: LlamaForCausalLM, dataset: PackedDataset, batch_size: int = 4) -> float:
    """Mean cross-entropy, in nats per predicted token, over the whole data set."""
    total, count = 0.0, 0
    for indices in torch.arange(len(dataset)).split(batch_size):
        batch = dataset.batch(indices)
        tokens = int((batch["labels"][:, 1:] != IGNORED_LABEL).sum())
        total += model(**batch, use_cache=False).loss.item() * tokens
        count += tokens
    return total / count


def _rate(step: int, settings: DemoSettings) -> float:
    if step < settings.warmup_steps:
        return (step + 1) / settings.warmup_steps
    done = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * done))
