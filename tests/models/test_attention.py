"""Banded attention taken in pieces."""

from __future__ import annotations

import pytest
import torch
from tiny import HIERARCHIES, photon_model, tokens

from lib.peak_memory import PeakMemory
from photon_train.models import attention_photon


@pytest.mark.parametrize("name", [name for name in HIERARCHIES if not name.startswith("block")])
def test_pieces_give_the_loss_and_the_gradients_of_the_whole(name, monkeypatch):
    """Pieces of one block, so that windows, sinks and units reach over their edges; an odd length, two rows."""
    model, ids = photon_model(name).train(), tokens(2, 47)

    def loss_and_gradients() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        model.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    whole, expected = loss_and_gradients()
    monkeypatch.setattr(attention_photon, "PIECE", 1)
    calls = []
    one_piece = attention_photon.BandSpan._attend_piece
    monkeypatch.setattr(
        attention_photon.BandSpan,
        "_attend_piece",
        lambda self, blocks, *rest: calls.append(blocks) or one_piece(self, blocks, *rest),
    )
    loss, found = loss_and_gradients()
    assert len({blocks.start for blocks in calls}) > 2
    assert torch.allclose(loss, whole, rtol=1e-5)
    assert found.keys() == expected.keys()
    for parameter, gradient in expected.items():
        assert torch.allclose(found[parameter], gradient, rtol=1e-3, atol=1e-5), parameter


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_backward_pass_repeats_the_forward_pass(dropout):
    """Dropout included: the gradient is that of the function that was run."""
    length, generator = 40, torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, heads, length, 4, generator=generator, dtype=torch.double, requires_grad=True)
        for heads in (4, 2, 2)
    )
    span = attention_photon.BandSpan(torch.arange(length), 6, 6, sinks=torch.arange(2))

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(1)
        return span.attend(0, query, key, value, 0.5, dropout, None)

    assert torch.autograd.gradcheck(attend, (query, key, value), fast_mode=True)


def test_gathered_keys_are_not_kept():
    """After the forward pass queries, keys, values and outputs are held, and one mask."""
    heads, dim, window, length = 4, 32, 64, 8192
    span = attention_photon.BandSpan(torch.arange(length), window, window)
    with PeakMemory() as memory:
        query, key, value = (torch.randn(1, heads, length, dim, requires_grad=True) for _ in range(3))
        out = span.attend(0, query, key, value, 1.0, 0.0, None)
        memory.start()
        assert out.requires_grad
    held = 4 * query.nbytes + span.mask.nbytes
    assert held <= memory.before < 1.05 * held
