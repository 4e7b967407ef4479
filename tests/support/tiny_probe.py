"""Tiny dense models that need their far attention, and text that shows it, shared by the tests of the probe."""

from __future__ import annotations

import torch
from tiny import base_config, shake, tokens
from transformers import AutoConfig, AutoModelForCausalLM

from photon_train.conversion.cells import ProbeText
from photon_train.conversion.dense_attention import DenseAttention

WINDOW, SINKS, LAYERS, HEADS, GROUPS, SIZE = 6, 2, 3, 2, 2, 8


def sharp_dense(family: str = "llama", dtype: torch.dtype = torch.float32, **changes):
    """A shaken dense model with sharp predictions, so that it matters what it has read."""
    settings = base_config(family, **changes)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    model = shake(AutoModelForCausalLM.from_config(config, attn_implementation="photon")).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(3)
    return model.to(dtype)


@torch.no_grad()
def own_text(model, count: int = 4, length: int = 40, name: str = "text") -> ProbeText:
    """Text that `model` itself has written: whatever restricts the model predicts it worse. Beyond the window alone."""
    generator = torch.Generator().manual_seed(5)
    ids = tokens(count, 4)
    while ids.shape[1] < length:
        segments = DenseAttention(ids).dense(model.config)
        logits = model(input_ids=ids, use_cache=False, photon_segments=segments).logits[:, -1]
        ids = torch.cat([ids, torch.multinomial(logits.softmax(-1), 1, generator=generator)], dim=1)
    return ProbeText(name, ids, (torch.arange(length) > WINDOW).expand(count, -1))


def quieten(model, loud: tuple[int, int]) -> None:
    """Let the output of every cell but one hardly count."""
    with torch.no_grad():
        for layer in range(LAYERS):
            for head in range(HEADS):
                if (layer, head) != loud:
                    columns = slice(head * GROUPS * SIZE, (head + 1) * GROUPS * SIZE)
                    model.model.layers[layer].self_attn.o_proj.weight[:, columns] *= 0.02
