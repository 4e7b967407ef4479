"""Tiny exports for vLLM, and what transformers makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import shake
from vllm import LLM, SamplingParams

from photon_train.models import PhotonConfig, PhotonForCausalLM

VOCABULARY = 128
# Within the window, beyond it, and with a prefix of several blocks.
LENGTHS = (1, 7, 30, 75, 200)
NEW_TOKENS = 24


def export(directory: Path, base_model_type: str = "llama", **changes: Any) -> PhotonForCausalLM:
    """Save a shaken model whose heads have a size that vLLM's CPU kernels know; fp32."""
    settings = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 512,
        "window": 24,
        "num_sinks": 3,
        "chunk_size": 2,
        "memory_cells": {0: [1], 2: [0, 1], 3: [0]},
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    torch.manual_seed(0)
    model = shake(PhotonForCausalLM(PhotonConfig(base_model_type=base_model_type, **{**settings, **changes}))).eval()
    model.save_pretrained(directory)
    # Where vLLM runs a family as transformers has it, it makes calls of that class compile, ours in this process too.
    model.model.do_not_compile = True
    return model


def prompts(lengths: tuple[int, ...] = LENGTHS) -> list[list[int]]:
    """Random tokens."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


def expected(model: PhotonForCausalLM, prompt: list[int], count: int = NEW_TOKENS) -> tuple[list[int], list[float]]:
    """What transformers writes after a prompt, and the log-probability of each token."""
    out = model.generate(
        torch.tensor([prompt]),
        max_new_tokens=count,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    tokens = out.sequences[0, len(prompt) :].tolist()
    rows = zip(out.logits, tokens, strict=True)
    return tokens, [row[0].float().log_softmax(-1)[token].item() for row, token in rows]


def generate(llm: LLM, given: list[list[int]], count: int = NEW_TOKENS) -> list[Any]:
    """vLLM's greedy outputs."""
    sampling = SamplingParams(temperature=0, max_tokens=count, logprobs=1, detokenize=False, ignore_eos=True)
    return llm.generate([{"prompt_token_ids": prompt} for prompt in given], sampling, use_tqdm=False)


def metric(llm: LLM, name: str) -> float:
    """The value of one of vLLM's counters."""
    return sum(found.value for found in llm.get_metrics() if found.name == f"vllm:{name}")


def check(model: PhotonForCausalLM, given: list[list[int]], outputs: list[Any], count: int = NEW_TOKENS) -> None:
    """vLLM wrote what transformers writes, with the same probabilities."""
    for prompt, output in zip(given, outputs, strict=True):
        tokens, logprobs = expected(model, prompt, count)
        found = output.outputs[0]
        assert list(found.token_ids) == tokens, f"prompt of {len(prompt)} tokens"
        theirs = [row[token].logprob for row, token in zip(found.logprobs, tokens, strict=True)]
        # A number between two levels of few bits may be rounded either way.
        assert theirs == pytest.approx(logprobs, abs=2e-4 if model.config.memory_bits == 16 else 1e-2)
