"""The fused kernel's description of bands, against the blockwise path; uncompiled, on the CPU."""

from __future__ import annotations

import pytest
import torch
from tiny import photon_model, tokens

from photon_train.models import attention_photon, flex_photon
from photon_train.models.flex_photon import BLOCK

# One of each kind: memory with sinks, at two levels, latents, rings with sinks, slots in the stream.
NAMES = ["memory-2-sinks", "memory-two-levels", "memory-latent", "residual-2", "slots-1", "slots-3"]


@pytest.fixture
def gradients_on_the_cpu(monkeypatch):
    """PyTorch has the uncompiled backward pass on the CPU, but refuses it."""
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *states: None)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_loss_and_gradients_are_those_of_the_blockwise_path(name, gradients_on_the_cpu):
    model, ids, results = photon_model(name).train(), tokens(2, 47), []
    for fused in ("no", "yes"):
        model.set_fused_bands(fused)
        model.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        results.append((loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
    (loss, expected), (fused_loss, found) = results
    assert torch.allclose(fused_loss, loss, rtol=1e-5)
    assert found.keys() == expected.keys()
    for parameter, gradient in expected.items():
        assert torch.allclose(found[parameter], gradient, rtol=1e-3, atol=1e-5), parameter


@pytest.mark.parametrize("window, alignment, num_sinks, units", [(64, 1, 0, 0), (200, 16, 3, 37), (300, 4, 150, 90)])
def test_listed_blocks_are_those_that_are_seen(window, alignment, num_sinks, units):
    positions = torch.arange(5 * BLOCK + 17)
    starts = attention_photon.window_start(positions, window, alignment)
    ends = (torch.arange(units) + 1) * 6 if units else None
    mask = flex_photon.band_mask(starts, positions, positions[:num_sinks] if num_sinks else None, ends)
    blocks = mask.visible().unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK)).transpose(1, 2).flatten(2)
    count, index = mask.block_mask.full_kv_num_blocks[0, 0], mask.block_mask.full_kv_indices[0, 0]
    full = torch.zeros(blocks.shape[:2], dtype=torch.bool)
    for row in range(len(full)):
        full[row, index[row, : count[row]].long()] = True
    assert torch.equal(full, blocks.all(2))
    listed = mask.block_mask.to_dense()[0, 0].bool()
    assert torch.equal(listed | full, listed) and not (blocks.any(2) & ~listed).any()
    # What is listed and not seen is little: bounds per block are not exact at the edges.
    assert int((listed & ~blocks.any(2)).sum()) <= len(full)


def test_the_number_of_blocks_is_linear_in_the_length():
    positions = torch.arange(8192)
    mask = flex_photon.band_mask((positions - 63).clamp(min=0), positions, positions[:4])
    assert int(mask.block_mask.kv_num_blocks.max()) <= 3 and not mask.block_mask.full_kv_num_blocks.any()


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_the_kernel_is_trusted_only_if_it_gives_the_softmax(monkeypatch, caplog, gradients_on_the_cpu):
    def wrong(query, key, value, **settings):
        return flex_photon.flex_attention(query, key, value, **{**settings, "scale": settings["scale"] * 1.1})

    def broken(*states, **settings):
        raise RuntimeError("no compiler")

    shape = torch.device("cpu"), torch.float32, 4, 2, 16
    for function, expected in ((flex_photon.flex_attention, ""), (wrong, "is off by"), (broken, "(no compiler)")):
        monkeypatch.setattr(flex_photon, "compiled", lambda function=function: function)
        caplog.clear()
        assert flex_photon.works.__wrapped__(*shape) == (not expected)
        assert expected in caplog.text


def test_bands_are_blockwise_on_the_cpu_unless_asked_for(monkeypatch):
    monkeypatch.setattr(attention_photon, "attend_fused", lambda *arguments: pytest.fail("fused"))
    model, ids = photon_model("memory-1").train(), tokens(1, 20)
    model(ids, labels=ids).loss.backward()
    with pytest.raises(ValueError, match="fused='flex' is not one of auto, yes, no"):
        model.set_fused_bands("flex")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("heads", [(8, 2, 64), (4, 4, 128)], ids=str)
def test_the_compiled_kernel_works_on_a_gpu(heads, dtype):
    assert flex_photon.works(torch.device("cuda", 0), dtype, *heads)
