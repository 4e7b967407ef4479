from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lib.peak_memory import PeakMemory
from photon_kernels import latent_decode, latent_decode_bytes

BACKENDS = ["torch", "triton"]


def make_inputs(
    device: torch.device,
    visible: tuple[int, ...] = (3, 9),
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    chunk_size: int = 4,
    num_units: int = 12,
    per_block: int = 0,
    first_token: int = 3,
    num_latents: int = 1,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> dict[str, Tensor | float | int]:
    """Streams that hold NaN where no row looks; rows of the cache are read in reverse."""
    generator = torch.Generator().manual_seed(seed)
    batch, width = len(visible), 2 * kv_heads * head_dim // num_latents
    folded = torch.randn(batch, heads, chunk_size, width, generator=generator) * width**-0.5
    bias = torch.randn(batch, heads, chunk_size, generator=generator)
    cache_rows = batch + 1
    rows = torch.arange(batch).flip(0)
    stream = torch.randn(2, cache_rows, kv_heads, num_units, head_dim, generator=generator)
    for row in range(cache_rows):
        index = rows.tolist().index(row) if row in rows.tolist() else None
        stream[:, row, :, 0 if index is None else visible[index] :] = float("nan")
    inputs = {
        "folded": folded.to(device, dtype),
        "bias": bias.to(device),
        "visible": torch.tensor(visible, device=device),
        "scale": 1.7,
        "first_token": first_token,
        "rows": rows.to(device),
    }
    if not per_block:
        return inputs | {"keys": stream[0].to(device, dtype), "values": stream[1].to(device, dtype)}
    count = -(-num_units // per_block)
    blocks = torch.randperm(cache_rows * count + 2, generator=generator)
    block_table = blocks[: cache_rows * count].view(cache_rows, count)
    held = torch.full((2, cache_rows * count + 2, kv_heads, per_block, head_dim), float("nan"))
    for row in range(cache_rows):
        for unit in range(num_units):
            held[:, block_table[row, unit // per_block], :, unit % per_block] = stream[:, row, :, unit]
    return inputs | {
        "keys": held[0].to(device, dtype),
        "values": held[1].to(device, dtype),
        "block_table": block_table.to(device),
        "stream": stream.to(device, dtype),
    }


def reference(inputs: dict) -> tuple[Tensor, Tensor, Tensor]:
    """Token by token, in float64."""
    folded, bias = (inputs[name].double().cpu() for name in ("folded", "bias"))
    stream = inputs["stream"] if "stream" in inputs else torch.stack([inputs["keys"], inputs["values"]])
    stream = stream.double().cpu()
    batch, heads, chunk_size, width = folded.shape
    mixed, mass = torch.zeros(folded.shape).double(), torch.zeros(batch, heads, chunk_size).double()
    lse = torch.full((batch, heads), -torch.inf).double()
    for row in range(batch):
        latents = stream[:, int(inputs["rows"][row])].transpose(0, 2).transpose(1, 2).flatten(1)
        for head in range(heads):
            products = folded[row, head] @ latents[:, :width].T + bias[row, head, :, None]
            seen = [
                (unit, token, float(inputs["scale"] * products[token, unit]))
                for unit in range(int(inputs["visible"][row]))
                for token in range(chunk_size)
                if unit * chunk_size + token >= inputs["first_token"]
            ]
            if not seen:
                continue
            lse[row, head] = torch.tensor([logit for *_, logit in seen]).double().logsumexp(0)
            for unit, token, logit in seen:
                weight = torch.exp(torch.tensor(logit).double() - lse[row, head])
                mixed[row, head, token] += weight * latents[unit, -width:]
                mass[row, head, token] += weight
    return mixed, mass, lse


def assert_matches_reference(inputs: dict, backend: str, tolerance: float = 2e-5, **settings) -> None:
    given = {name: value for name, value in inputs.items() if name != "stream"}
    found = latent_decode(**given, backend=backend, **settings)
    assert found.mixed.dtype == inputs["folded"].dtype and found.mass.dtype == found.lse.dtype == torch.float32
    for mine, expected in zip(found, reference(inputs), strict=True):
        torch.testing.assert_close(mine.double().cpu(), expected, atol=tolerance, rtol=tolerance)


SHAPES = {
    "grouped heads": dict(),
    "one head, units of one token": dict(heads=1, kv_heads=1, chunk_size=1, first_token=0),
    "odd sizes": dict(visible=(7, 1, 11), heads=6, kv_heads=3, head_dim=24, chunk_size=3),
    "rows that see nothing": dict(visible=(0, 5, 0)),
    "sinks hide all that is there": dict(visible=(1, 2), first_token=8),
    "blocks": dict(per_block=4, visible=(11, 2)),
    "odd blocks": dict(per_block=5, visible=(12, 6), num_units=14),
    "blocks of whole tiles": dict(per_block=64, num_units=130, visible=(129, 65), heads=2, kv_heads=1),
    "keys and values apart": dict(num_latents=2, per_block=5, visible=(12, 6), num_units=14),
    "apart, several tiles": dict(num_latents=2, num_units=90, visible=(90, 33), heads=20, kv_heads=2),
    "several tiles of units and queries": dict(num_units=90, visible=(90, 33), heads=20, kv_heads=2),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_equals_a_softmax_token_by_token(shape: dict, backend: str, device: torch.device) -> None:
    assert_matches_reference(make_inputs(device, **shape), backend)


@pytest.mark.parametrize("num_splits", [1, 2, 5])
def test_any_number_of_parts(num_splits: int, device: torch.device) -> None:
    inputs = make_inputs(device, num_units=70, visible=(70, 20), per_block=10)
    assert_matches_reference(inputs, "triton", num_splits=num_splits)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype, backend: str, device: torch.device) -> None:
    inputs = make_inputs(device, dtype=dtype, visible=(30, 9), num_units=33, per_block=8)
    assert_matches_reference(inputs, backend, tolerance=1.5e-2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_rows_and_units_and_batch(backend: str, device: torch.device) -> None:
    inputs = make_inputs(device, visible=(3, 9))
    straight = {**inputs, "rows": None} | {name: inputs[name][inputs["rows"]] for name in ("keys", "values")}
    expected = latent_decode(**inputs, backend="torch")
    for mine, theirs in zip(latent_decode(**straight, backend=backend), expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=2e-5)
    none = {**straight, "keys": straight["keys"][:, :, :0], "values": straight["values"][:, :, :0]}
    found = latent_decode(**none | {"visible": inputs["visible"] * 0}, backend=backend)
    assert not found.mixed.any() and not found.mass.any() and (found.lse == -torch.inf).all()


def test_what_does_not_fit_is_named(device: torch.device) -> None:
    inputs = make_inputs(device)
    for changes, message in [
        ({"folded": inputs["folded"][..., :-1]}, "width 63, the latents have 64"),
        ({"keys": inputs["keys"].double()}, "one dtype"),
        ({"bias": inputs["bias"][:1]}, r"bias must be \[2, 4, 4\]"),
        ({"visible": inputs["visible"].float()}, "visible must be int32 or int64"),
        ({"rows": None}, "2 rows of queries, but 3 cache rows"),
        ({"num_splits": 0}, "num_splits must be at least 1"),
        ({"backend": "cuda"}, "backend='cuda' is unknown"),
    ]:
        with pytest.raises(ValueError, match=message):
            latent_decode(**inputs | changes)


def test_gradients_are_refused_on_triton(device: torch.device) -> None:
    inputs = make_inputs(device)
    inputs["folded"].requires_grad_()
    with pytest.raises(RuntimeError, match="computes no gradients"):
        latent_decode(**inputs, backend="triton")


def test_what_it_holds_while_it_runs_is_counted(device):
    """All but its result: no more, and not less by a tenth."""
    inputs = make_inputs(device, num_units=1024)
    with PeakMemory(device) as memory, torch.no_grad():
        memory.start()
        found = latent_decode(**inputs, num_splits=1, backend="triton")
        memory.stop()
    held = memory.peak - memory.before - sum(each.numel() * each.element_size() for each in found)
    counted = latent_decode_bytes(2, 4, 4, 1024, 16, 4)
    assert 0.9 * counted < held <= 1.02 * counted
