"""Attention to one set of keys, against its formula in float64."""

from __future__ import annotations

import math

import pytest
import torch

from photon_train.models.softmax_photon import attend_set


def by_formula(query, key, value, bias, scale):
    """Output and log-sum-exp in float64, head by head."""
    query, key, value, bias = (states.double() for states in (query, key, value, bias))
    groups, out, lse = query.shape[1] // key.shape[1], [], []
    for head in range(query.shape[1]):
        scores = query[:, head] @ key[:, head // groups].transpose(1, 2) * scale + bias[:, 0]
        out.append(scores.softmax(-1) @ value[:, head // groups])
        lse.append(scores.exp().sum(-1).log())
    return torch.stack(out, dim=1), torch.stack(lse, dim=1)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("heads", [(6, 2), (5, 5), (4, 1)])
def test_one_set_of_keys(dtype, tolerance, queries, heads):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, heads[0], queries, 16, generator=generator).to(dtype)
    # Keys and values as pages hold them: tokens before heads, a value beside its key.
    tokens = torch.randn(2, 37, heads[1], 32, generator=generator).to(dtype)
    key, value = tokens.transpose(1, 2).chunk(2, dim=-1)
    bias = torch.zeros(2, 1, queries, 37, dtype=dtype)
    bias[0, :, :, 5:] = bias[1, :, :, :9] = -torch.inf
    out, lse = attend_set(query, key, value, bias, 0.3)
    assert out.dtype == dtype and lse.dtype == torch.float32
    expected = by_formula(query, key, value, bias, 0.3)
    for found, wanted in zip((out, lse), expected, strict=True):
        torch.testing.assert_close(found.double(), wanted, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("queries", [1, 2])
def test_a_query_that_sees_nothing_weighs_nothing(dtype, queries):
    states = torch.randn(1, 2, 7, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    bias = torch.full((1, 1, queries, 7), -torch.inf, dtype=dtype)
    out, lse = attend_set(states[:, :, :queries], states, states, bias, 0.3, may_see_none=True)
    assert not out.any() and bool((lse == -math.inf).all())
