"""The Triton backend against the torch backend and the teacher-forced forward (interpreter on CPU, or a GPU)."""

from __future__ import annotations

import pytest
import torch
from tiny import photon_model, tokens

from photon_train.inference.engine import Engine, EngineSettings
from photon_train.inference.request import SamplingParams

# One of each kind of path: rings with sinks, isolated groups, slots in a stream, memory at two levels, full layers.
NAMES = ["block-2", "memory-2-sinks", "memory-two-levels", "memory-latent", "memory-latent-apart"]
NAMES += ["memory-3-full", "residual-2", "slots-2-decoder"]


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_triton_logits_equal_torch_logits_and_the_training_forward(name, triton_device):
    model = photon_model(name).to(triton_device)
    # Long enough that units lie outside the windows, and chunks of every level close in the few (slow) steps.
    widths, count = (9, 14), 7
    rows = [tokens(1, count + length, seed=length).to(triton_device) for length in widths]
    expected = [model(row).logits[0] for row in rows]
    prompt = torch.full((2, max(widths)), 2, device=triton_device)
    mask = torch.zeros_like(prompt)
    for index, width in enumerate(widths):
        prompt[index, -width:], mask[index, -width:] = rows[index][0, :width], 1
    logits = {}
    for backend in ("torch", "triton"):
        model.set_backend(backend)
        cache = model(prompt, attention_mask=mask, use_cache=True).past_key_values
        steps = []
        for step in range(count):
            column = torch.stack([row[0, width + step] for row, width in zip(rows, widths, strict=True)])
            steps.append(model(column[:, None], past_key_values=cache).logits[:, 0])
        logits[backend] = torch.stack(steps, dim=1)
    torch.testing.assert_close(logits["triton"], logits["torch"], atol=2e-4, rtol=0)
    for index, width in enumerate(widths):
        torch.testing.assert_close(logits["triton"][index], expected[index][width:], atol=2e-4, rtol=0)


@pytest.mark.parametrize("name", ["block-2", "memory-two-levels", "memory-latent", "slots-2-decoder"])
def test_the_engine_decodes_the_same_on_triton(name, triton_device):
    model = photon_model(name).to(triton_device)
    model.generation_config.eos_token_id = None
    prompts = [tokens(1, length, seed=length)[0].tolist() for length in (3, 9)]
    answers = []
    for backend in ("torch", "triton"):
        model.set_backend(backend)
        engine = Engine(model, settings=EngineSettings(max_sequences=2, max_prefixes=0, max_length=64, page_tokens=12))
        answers.append([one[0].tokens for one in engine.generate(prompts, SamplingParams(max_new_tokens=7))])
    assert answers[0] == answers[1]


def test_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="backend 'cuda' is not one of torch, triton"):
        photon_model("memory-1").set_backend("cuda")
