"""A text sample for the report."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase


def sample_text(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, max_new_tokens: int, seed: int = 0
) -> str:
    """What `model` writes after `prompt`, drawn from the 95% nucleus at temperature 0.8: small models repeat
    themselves when decoded greedily.

    Args:
        model: The exported model.
        tokenizer: Its tokenizer.
        prompt: Text to continue; without a token in it, the model starts from its BOS (or EOS) token.
        max_new_tokens: Tokens to write; 0 gives the empty text.
        seed: Seed of the draws. The global generators are left as they were.
    """
    if not max_new_tokens:
        return ""
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"].long().to(model.device)
    if not ids.numel():
        start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        ids = torch.tensor([[start]], device=model.device)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        written = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=True,
            temperature=0.8,
            top_p=0.95,
            pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        )
    return tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)
