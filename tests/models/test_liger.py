"""liger-kernel's guard: a CPU has no use for it, and what is wrong is not used."""

from __future__ import annotations

import copy
import importlib.util

import pytest
import torch
import torch.nn.functional as F
from tiny import photon_model, tokens

from photon_train.models import liger_photon


@pytest.fixture
def installed(monkeypatch):
    """As if liger-kernel were installed and computed what torch computes."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(
        liger_photon, "_fused_norm", lambda x, weight, epsilon: F.rms_norm(x, x.shape[-1:], weight, epsilon)
    )
    monkeypatch.setattr(liger_photon, "_fused_gate", lambda gate, up: F.silu(gate) * up)


def test_without_the_package_nothing_changes(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    model = photon_model("memory")
    assert liger_photon.fuse_layers(model) == 0
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_every_norm_and_mlp_is_fused_where_it_can_run(family, installed, monkeypatch):
    model, ids = photon_model("memory-many-sinks", family), tokens(2, 14)
    expected = model(ids).logits
    layers = model.config.num_hidden_layers
    per_layer = 5 if family == "qwen3" else 3  # two norms and an MLP; qwen3 also has norms of queries and keys
    assert liger_photon.fuse_layers(model) == 1 + layers * per_layer
    # On a CPU it is torch that runs.
    monkeypatch.setattr(liger_photon, "_fused_gate", lambda *states: pytest.fail("fused on a CPU"))
    assert torch.equal(model(ids).logits, expected)
    monkeypatch.setattr(liger_photon, "_fused_gate", lambda gate, up: F.silu(gate) * up)
    monkeypatch.setattr(liger_photon, "_usable", lambda hidden: True)
    calls = []
    norm = liger_photon._fused_norm
    monkeypatch.setattr(liger_photon, "_fused_norm", lambda *states: calls.append(1) or norm(*states))
    assert torch.allclose(model(ids).logits, expected, atol=1e-4)
    assert len(calls) == 1 + layers * (per_layer - 1)
    # A copy is fused with its own weights.
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.model.norm.weight.zero_()
    assert not twin(ids).logits.any() and torch.allclose(model(ids).logits, expected, atol=1e-4)


def test_other_activations_are_left_alone(installed):
    model = photon_model("memory")
    model.model.layers[0].mlp.act_fn = torch.nn.GELU()
    liger_photon.fuse_layers(model)
    assert "forward" not in vars(model.model.layers[0].mlp)


def test_kernels_are_used_only_if_they_give_what_torch_gives(installed, monkeypatch, caplog):
    def broken(*states):
        raise RuntimeError("no compiler")

    here = torch.device("cpu"), torch.float32
    assert liger_photon.works.__wrapped__(*here)
    monkeypatch.setattr(liger_photon, "_fused_gate", lambda gate, up: 1.001 * F.silu(gate) * up)
    assert not liger_photon.works.__wrapped__(*here) and "is off by" in caplog.text
    monkeypatch.setattr(liger_photon, "_fused_gate", broken)
    assert not liger_photon.works.__wrapped__(*here) and "(no compiler)" in caplog.text


def test_kernels_can_be_tried_first_in_a_checkpointed_layer(installed, caplog):
    tried = []

    def layer(states):
        if not tried:
            tried.append(liger_photon.works.__wrapped__(torch.device("cpu"), torch.float32))
        return (states.sin() * states).exp()

    states = torch.randn(3, 4, requires_grad=True)
    torch.utils.checkpoint.checkpoint(layer, states, use_reentrant=False).sum().backward()
    (expected,) = torch.autograd.grad((states.sin() * states).exp().sum(), states)
    assert tried == [True] and not caplog.text
    torch.testing.assert_close(states.grad, expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_installed_package_works_on_a_gpu(dtype):
    pytest.importorskip("liger_kernel")
    assert liger_photon.works(torch.device("cuda", 0), dtype)
