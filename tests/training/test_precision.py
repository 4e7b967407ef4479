"""What training holds and how it recomputes it: the types of states, and both ways of gradient checkpointing."""

from __future__ import annotations

import pytest
import torch
from tiny import tokens
from tiny_training import tiny_model

from photon_train.config import LoraSettings
from photon_train.training.lora import add_lora

LORA = LoraSettings(rank=4, alpha=8)


@pytest.mark.parametrize("name", ["llama", "memory", "memory-apart"])
@pytest.mark.parametrize(("weights", "stream"), [(torch.bfloat16, torch.bfloat16), (torch.float32, torch.float32)])
def test_the_residual_stream_has_the_dense_models_type(name, weights, stream):
    """Nothing that a graft adds widens it: half of the activations' memory would be lost."""
    model = add_lora(tiny_model(name).to(weights), LORA).train()
    seen = set()
    base = model.get_base_model()
    for layer in base.model.layers:
        layer.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(tokens(2, 30), labels=tokens(2, 30)).loss
    loss.backward()
    assert seen == {stream}
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["memory", "memory-full"])
@pytest.mark.parametrize("adapted", [False, True])
def test_both_ways_of_checkpointing_change_no_gradient(name, reentrant, adapted):
    ids, found = tokens(2, 31), []
    for checkpointing in (False, True):
        model = tiny_model(name)
        model = add_lora(model, LORA) if adapted else model
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        runs = []
        base = model.get_base_model() if adapted else model
        base.model.layers[0].mlp.register_forward_pre_hook(lambda *_, runs=runs: runs.append(1))
        model.train()(ids, labels=ids).loss.backward()
        assert len(runs) == (2 if checkpointing else 1)
        found.append({key: p.grad for key, p in model.named_parameters() if p.requires_grad})
    for key, gradient in found[0].items():
        torch.testing.assert_close(found[1][key], gradient, atol=1e-6, rtol=1e-4, msg=key)
