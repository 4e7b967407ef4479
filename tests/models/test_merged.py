"""Attention to a band and a far prefix, merged: against one softmax over all keys in float64, gradients included."""

from __future__ import annotations

import pytest
import torch
from tiny import photon_model, tokens

from photon_train.models import merged_photon
from photon_train.models.attention_photon import window_start
from photon_train.models.latent_photon import LatentSpan, widen_far, widen_near


def random(*shape):
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def joint_softmax(query, content, key, value, far, near_seen, far_seen, scale):
    groups = query.shape[1] // key.shape[1]
    keys, values, far_keys, far_values = (
        states.repeat_interleave(groups, dim=1) for states in (key, value, far[0], far[1])
    )
    scores = torch.cat([query @ keys.transpose(2, 3), content @ far_keys.transpose(2, 3)], dim=3) * scale
    weights = scores.masked_fill(~torch.cat([near_seen, far_seen], dim=1), -torch.inf).softmax(dim=-1)
    return weights @ torch.cat([values, far_values], dim=2)


def span(length, window, alignment, unit, num_sinks, unrotate):
    positions = torch.arange(length)
    identity = {"pack": lambda layer, keys, values: (keys, values), "unpack": lambda layer, units: units}
    return LatentSpan(
        positions,
        window,
        block=window + alignment - 1,
        alignment=alignment,
        sinks=positions[:num_sinks] if num_sinks else None,
        sources={0: 0},
        unit_span=unit,
        turn_back=unrotate,
        fused="no",
        **identity,
    )


@pytest.fixture(params=["flash", "plain"])
def implementation(request, monkeypatch):
    """The operation of the CPU, and what runs where there is none."""
    if request.param == "plain":
        monkeypatch.setattr(merged_photon, "_FLASH_DEVICE", "none")


@pytest.mark.parametrize(
    "length, window, alignment, unit, num_sinks, heads, kv_heads",
    [(53, 8, 4, 4, 3, 4, 2), (64, 8, 4, 4, 0, 2, 2), (7, 8, 4, 2, 4, 4, 1), (2100, 40, 8, 4, 4, 2, 1)],
)
def test_outputs_and_gradients_are_those_of_one_softmax(
    length, window, alignment, unit, num_sinks, heads, kv_heads, implementation
):
    torch.manual_seed(0)
    query, key, value = random(2, heads, length, 8), random(2, kv_heads, length, 8), random(2, kv_heads, length, 8)
    turn = torch.randn(8, 8, dtype=torch.float64)
    # The far keys here are the layer's own, cut to whole units: pack and unpack are identities.
    found = span(length, window, alignment, unit, num_sinks, lambda states: states @ turn).attend(
        0, query, key, value, 0.3, 0.0, None
    )
    token = torch.arange(length)
    start = window_start(token, window, alignment)[:, None]
    near_seen = (token <= token[:, None]) & ((token >= start) | (token < num_sinks))
    far_seen = (token < start) & (token >= num_sinks)
    expected = joint_softmax(query, query @ turn, key, value, (key, value), near_seen, far_seen, 0.3)
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-9)
    upstream = torch.randn_like(found)
    leaves = (query, key, value)
    gradients = zip(
        torch.autograd.grad(found, leaves, upstream), torch.autograd.grad(expected, leaves, upstream), strict=True
    )
    assert all(torch.allclose(mine, theirs, rtol=1e-8, atol=1e-8) for mine, theirs in gradients)


def test_far_keys_that_nothing_sees_may_be_anything():
    """Values of units inside every window, NaN included, have no influence."""
    torch.manual_seed(0)
    query, key, value = random(1, 2, 30, 8), random(1, 1, 30, 8), random(1, 1, 30, 8)
    banded = span(30, 8, 4, 4, 2, lambda states: states)
    last = int(window_start(torch.tensor(29), 8, 4))
    outputs = []
    for fill in (0.0, torch.nan):
        far = [torch.cat([side[:, :, :last], torch.full_like(side[:, :, last:], fill)], dim=2) for side in (key, value)]
        banded.unpack = lambda layer, units, far=far: far
        outputs.append(banded.attend(0, query, key, value, 0.3, 0.0, None))
    assert torch.equal(*outputs)
    for gradient in torch.autograd.grad(outputs[1].sum(), (query, key, value)):
        assert gradient.isfinite().all()


def test_the_model_agrees_with_the_gathered_path(monkeypatch):
    """Attention dropout takes the path that copies the far keys for each block; here without dropping anything."""

    def gathered(self, query, content, key, value, scale, *far):
        near = widen_near(query, content, key, value)
        return self._attend_pieces(*near, scale, 0.0, widen_far(*far))[..., : query.shape[-1]]

    model, ids, results = photon_model("memory-latent").train(), tokens(2, 47), []
    for path in (LatentSpan._attend_merged, gathered):
        monkeypatch.setattr(LatentSpan, "_attend_merged", path)
        model.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        results.append((loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
    (loss, gradients), (again, expected) = results
    assert torch.allclose(loss, again, rtol=1e-5) and gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.allclose(gradients[name], gradient, rtol=1e-3, atol=1e-5), name
