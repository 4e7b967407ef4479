"""Numbers in 8 and 4 bits against the nearest of their levels, found by search in float64."""

from __future__ import annotations

import math

import pytest
import torch

from photon_train.models.quantize_photon import StoredVectors, StraightThrough, dequantize, quantize

BITS = [8, 4]
SHAPES = [(2,), (3, 8), (2, 3, 5, 64), (1, 1, 7, 128), (0, 4), (4, 0, 6)]
EITHER = pytest.mark.parametrize("bits", BITS)


def samples(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Vectors of very different lengths."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.logspace(-6, 6, max(1, math.prod(shape[:-1])))[: math.prod(shape[:-1])]
    return (torch.randn(shape, generator=generator) * lengths.view(*shape[:-1], 1)).to(dtype)


def distance(states: torch.Tensor, scales: torch.Tensor, bits: int) -> torch.Tensor:
    """How far the nearest of the ``2 ** bits`` odd multiples of half a step is, in float64."""
    levels = (torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1)) + 0.5) * scales.double().unsqueeze(-1)
    return (states.double().unsqueeze(-1) - levels).abs().amin(-1)


@EITHER
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_each_number_becomes_a_nearest_level(shape, dtype, bits):
    states = samples(*shape).clamp(-6e4, 6e4).to(dtype)
    codes, scales = quantize(states, bits)
    assert codes.dtype == torch.uint8 and codes.shape == (*shape[:-1], shape[-1] * bits // 8)
    assert scales.dtype == torch.bfloat16 and scales.shape == (*shape[:-1], 1)
    # One scale per vector, which spreads the levels over it, up to the scale's own eight bits.
    spread = states.double().abs().amax(-1, keepdim=True) / 2 ** (bits - 1) if states.numel() else scales.double()
    torch.testing.assert_close(scales.double(), spread, rtol=2**-8, atol=1e-29)
    found = dequantize(codes, scales, bits, torch.float64)
    assert found.dtype == torch.float64 and found.shape == states.shape
    steps = scales.double()
    torch.testing.assert_close(found / steps % 1, torch.full_like(found, 0.5), rtol=0, atol=1e-6)
    found, best = (found - states.double()).abs() / steps, distance(states, scales, bits) / steps
    torch.testing.assert_close(found, best, rtol=0, atol=1e-5)


@EITHER
def test_the_worst_error_is_half_a_step(bits):
    states = samples(500, 64)
    codes, scales = quantize(states, bits)
    error = (dequantize(codes, scales, bits, torch.float64) - states).abs() / scales.double()
    # A scale that was rounded down leaves the largest number a little beyond its level.
    beyond = (states.abs() / scales.double() - 2 ** (bits - 1)).clamp(min=0)
    assert beyond.max() <= 2 ** (bits - 1) * 2**-8
    assert (error - beyond).max() <= 0.5 + 1e-5
    assert 0.49 < error.max() and error.mean() == pytest.approx(0.25, abs=0.01)


@EITHER
def test_levels_are_symmetric_and_all_are_used(bits):
    half = 2 ** (bits - 1)
    states = (torch.arange(-half, half) + 0.5)[None]
    states = torch.cat([states, states.new_tensor([[half, -half]])], dim=1)
    codes, scales = quantize(states, bits)
    assert scales.item() == 1.0
    found = dequantize(codes, scales, bits, torch.float32)
    assert torch.equal(found[:, :-2], states[:, :-2])
    assert found[0, -2:].tolist() == [half - 0.5, 0.5 - half]
    # Numbers at the bounds, however the scale was rounded, stay within the levels.
    states = samples(2000, 2)
    states[:, 1] = -states[:, 0]
    codes, scales = quantize(states, bits)
    found = dequantize(codes, scales, bits, torch.float64)
    torch.testing.assert_close(found, states.double().sign() * (half - 0.5) * scales.double(), rtol=1e-6, atol=0)


def test_of_four_bits_a_byte_holds_a_number_of_each_half():
    states = torch.tensor([[-7.5, 7.5, 0.5, 8.0, -8.0, 3.5, -0.5, 2.5]])
    codes, scales = quantize(states, 4)
    assert scales.item() == 1.0
    assert codes.tolist() == [[0 | 0 << 4, 15 | 11 << 4, 8 | 7 << 4, 15 | 10 << 4]]


@EITHER
def test_zeros_stay_next_to_nothing(bits):
    codes, scales = quantize(torch.zeros(3, 8), bits)
    assert scales.isfinite().all() and (scales > 0).all()
    found = dequantize(codes, scales, bits, torch.float32)
    assert found.isfinite().all() and found.abs().max() < 1e-30
    assert quantize(torch.full((1, 8), 1e-40), bits)[1].isfinite().all()


@EITHER
def test_one_large_number_costs_its_own_vector_alone(bits):
    states = samples(4, 64)[2:3].expand(3, -1).clone()
    states[1, 5] = 1e30
    codes, scales = quantize(states, bits)
    found = dequantize(codes, scales, bits, torch.float64)
    assert found[1, 5].item() == pytest.approx(1e30, rel=2**-bits + 2**-8)
    assert torch.equal(found[0], found[2]) and (found[0] - states[0]).abs().max() <= scales[0].double() * 0.76
    others = torch.arange(64) != 5
    assert torch.equal(found[1, others].abs(), (scales[1].double() / 2).expand(63))


@EITHER
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_seen_in_its_own_vector(bad, bits):
    """A cache must not hide it, nor spread it."""
    states = samples(2, 3, 8)
    expected = dequantize(*quantize(states, bits), bits, torch.float32)
    states[1, 1, 4] = bad
    found = dequantize(*quantize(states, bits), bits, torch.float32)
    assert not found[1, 1].isfinite().any()
    found[1, 1] = expected[1, 1]
    assert torch.equal(found, expected)


@EITHER
def test_what_is_read_has_the_type_that_was_asked_for(bits):
    states = samples(6, 16).clamp(-1e4, 1e4)
    codes, scales = quantize(states, bits)
    exact = dequantize(codes, scales, bits, torch.float32)
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(dequantize(codes, scales, bits, dtype), exact.to(dtype))
    # What was read is a fixed point, but for the scale: only its levels lie elsewhere.
    again = quantize(exact, bits)[1].double()
    torch.testing.assert_close(again, scales.double() * (1 - 2**-bits), rtol=2**-8, atol=0)


def test_gradients_pass_straight_through():
    states = samples(3, 8).requires_grad_()
    rounded = dequantize(*quantize(states.detach(), 4), 4, torch.float32).requires_grad_()
    out = StraightThrough.apply(states, rounded)
    assert torch.equal(out, rounded)
    upstream = torch.randn(3, 8)
    out.backward(upstream)
    assert torch.equal(states.grad, upstream) and rounded.grad is None


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_products_with_stored_vectors(bits, dtype, monkeypatch):
    """In several pieces, the last one short; of heads that lie between each other's vectors."""
    monkeypatch.setattr("photon_train.models.quantize_photon.PIECE", 64)
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(2, 150, 3, 8, generator=generator).to(dtype).transpose(1, 2)
    queries = torch.randn(2, 5, 24, generator=generator).to(dtype)
    weights = torch.randn(2, 5, 150, generator=generator).softmax(-1)
    codes, scales, exact = vectors, None, vectors.double()
    if bits < 16:
        codes, scales = quantize(vectors, bits)
        exact = dequantize(codes, scales, bits, torch.float64)
    stored = StoredVectors(codes, scales, bits, dtype)
    joined = exact.transpose(1, 2).flatten(2)
    assert stored.dot(queries).dtype == torch.float32 and stored.mix(weights).dtype == dtype
    tolerance = {"atol": 6e-2, "rtol": 2e-2} if dtype == torch.bfloat16 else {"atol": 1e-5, "rtol": 1e-5}
    pieces = stored.pieces()
    assert len(pieces) == (1 if bits == 16 else 3)
    found = torch.cat([piece.dot(queries) for piece in pieces], dim=-1)
    torch.testing.assert_close(found.double(), queries.double() @ joined.transpose(1, 2), **tolerance)
    shares = weights.split([piece.states.shape[2] for piece in pieces], dim=-1)
    found = sum(piece.mix(share).double() for piece, share in zip(pieces, shares, strict=True))
    torch.testing.assert_close(found, weights.double() @ joined, **tolerance)
