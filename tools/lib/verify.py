"""Does a converted model compute the dense function where its plan promises so?"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from photon_train.checkpoints import read_config, with_softcap


@torch.no_grad()
def verify_preserves(checkpoint_dir: Path, photon_dir: Path, length: int = 64, seed: int = 0) -> float:
    """Largest difference between the logits of a dense model and of its conversion, in fp32.

    The PHOTON model runs with a window that holds the whole text, where a plan with `preserves_dense` promises 0 up to
    rounding (1e-4 for logits of order 1). Both models are loaded whole: meant for small ones.

    Args:
        checkpoint_dir: The dense checkpoint.
        photon_dir: What `apply.convert` made of it.
        length: Tokens of the two random sequences that are compared.
        seed: Seed of the tokens.
    """
    dense = with_softcap(AutoModelForCausalLM.from_pretrained(checkpoint_dir, dtype=torch.float32)).eval()
    config = read_config(photon_dir)
    if config.window is not None:
        config.window = max(length, config.window)
    photon = AutoModelForCausalLM.from_pretrained(photon_dir, config=config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(dense.config.vocab_size, (2, length), generator=generator)
    return (dense(tokens).logits - photon(tokens).logits).abs().max().item()
