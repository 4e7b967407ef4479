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
    bits: int = 16,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> dict[str, Tensor | float | int]:
    """Streams (or scales of codes) that hold NaN where no row looks; rows of the cache are read in reverse."""
    generator = torch.Generator().manual_seed(seed)
    batch, width = len(visible), 2 * kv_heads * head_dim // num_latents
    folded = torch.randn(batch, heads, chunk_size, width, generator=generator) * width**-0.5
    bias = torch.randn(batch, heads, chunk_size, generator=generator)
    cache_rows = batch + 1
    rows = torch.arange(batch).flip(0)
    shape = (2, cache_rows, kv_heads, num_units)
    stored = {"stream": torch.randn(*shape, head_dim, generator=generator)}
    if bits < 16:
        codes = torch.randint(0, 2**bits, (*shape, head_dim), generator=generator)
        scales = (0.5 + torch.rand(*shape, 1, generator=generator)).to(torch.bfloat16) / 2 ** (bits - 1)
        stored = {"codes": pack_bytes(codes, bits), "scales": scales}
        stream = (codes.double() - (2**bits - 1) / 2) * scales.double()
    for row in range(cache_rows):
        index = rows.tolist().index(row) if row in rows.tolist() else None
        stored["scales" if bits < 16 else "stream"][:, row, :, 0 if index is None else visible[index] :] = float("nan")
    if bits == 16:
        stream = stored["stream"]
    inputs = {
        "folded": folded.to(device, dtype),
        "bias": bias.to(device),
        "visible": torch.tensor(visible, device=device),
        "scale": 1.7,
        "first_token": first_token,
        "rows": rows.to(device),
        "bits": bits,
    }
    if per_block:
        count = -(-num_units // per_block)
        blocks = torch.randperm(cache_rows * count + 2, generator=generator)
        block_table = blocks[: cache_rows * count].view(cache_rows, count)
        inputs["block_table"] = block_table.to(device)
        stored = {name: in_blocks(tensor, block_table, per_block) for name, tensor in stored.items()}
    if bits == 16:
        keys, values = stored["stream"].to(device, dtype)
        return inputs | {"keys": keys, "values": values, "stream": stream.to(device, dtype)}
    keys, values = stored["codes"].to(device)
    return inputs | {"keys": keys, "values": values, "scales": tuple(stored["scales"].to(device)), "stream": stream}


def pack_bytes(codes: Tensor, bits: int) -> Tensor:
    """Codes ``[..., D]`` as the cache stores them: of 4 bits, number i below number D / 2 + i."""
    if bits == 8:
        return codes.to(torch.uint8)
    half = codes.shape[-1] // 2
    return torch.stack([codes[..., i] + 16 * codes[..., half + i] for i in range(half)], dim=-1).to(torch.uint8)


def in_blocks(stored: Tensor, block_table: Tensor, per_block: int) -> Tensor:
    """Rows ``[2, rows, Hkv, U, X]`` in the blocks that the table says; what no row has is NaN (or any code)."""
    fill = float("nan") if stored.is_floating_point() else 255
    held = torch.full((2, block_table.numel() + 2, stored.shape[2], per_block, stored.shape[4]), fill).to(stored.dtype)
    for row in range(stored.shape[1]):
        for unit in range(stored.shape[3]):
            held[:, block_table[row, unit // per_block], :, unit % per_block] = stored[:, row, :, unit]
    return held


def reference(inputs: dict) -> tuple[Tensor, Tensor, Tensor]:
    """Token by token, in float64."""
    folded, bias = (inputs[name].double().cpu() for name in ("folded", "bias"))
    stream = inputs["stream"].double().cpu()
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


def run(inputs: dict, **settings):
    """The operation on what `make_inputs` gives."""
    return latent_decode(**{name: value for name, value in {**inputs, **settings}.items() if name != "stream"})


def assert_matches_reference(inputs: dict, backend: str, tolerance: float = 2e-5, **settings) -> None:
    found = run(inputs, backend=backend, **settings)
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
    "4 bits": dict(bits=4, head_dim=32, visible=(9, 3)),
    "4 bits, odd sizes, apart": dict(
        bits=4, num_latents=2, head_dim=24, kv_heads=3, heads=6, chunk_size=3, per_block=5
    ),
    "4 bits, units of one token": dict(bits=4, chunk_size=1, heads=3, kv_heads=1, first_token=0, per_block=4),
    "4 bits, several tiles": dict(bits=4, num_units=90, visible=(90, 33), heads=20, kv_heads=2, num_latents=2),
    "8 bits": dict(bits=8, per_block=4, visible=(11, 2)),
    "8 bits, odd sizes": dict(bits=8, visible=(7, 1, 11), heads=6, kv_heads=3, head_dim=24, chunk_size=3),
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
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_half_precision(bits: int, dtype: torch.dtype, backend: str, device: torch.device) -> None:
    inputs = make_inputs(device, dtype=dtype, bits=bits, visible=(30, 9), num_units=33, per_block=8)
    assert_matches_reference(inputs, backend, tolerance=1.5e-2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_rows_and_units_and_batch(backend: str, device: torch.device) -> None:
    inputs = make_inputs(device, visible=(3, 9))
    straight = {**inputs, "rows": None} | {name: inputs[name][inputs["rows"]] for name in ("keys", "values")}
    expected = run(inputs, backend="torch")
    for mine, theirs in zip(run(straight, backend=backend), expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=2e-5)
    none = {**straight, "keys": straight["keys"][:, :, :0], "values": straight["values"][:, :, :0]}
    found = run(none, visible=inputs["visible"] * 0, backend=backend)
    assert not found.mixed.any() and not found.mass.any() and (found.lse == -torch.inf).all()


def test_what_does_not_fit_is_named(device: torch.device) -> None:
    inputs = make_inputs(device)
    for changes, message in [
        ({"folded": inputs["folded"][..., :-1]}, "width 63, the latents have 64"),
        ({"keys": inputs["keys"].double()}, "keys and values must be torch.float32, got torch.float64"),
        ({"bits": 4}, "bits=4 must be 16, or 8 or 4 with scales"),
        ({"bits": 8, "scales": (inputs["bias"], inputs["bias"])}, "keys and values must be torch.uint8"),
        ({"bias": inputs["bias"][:1]}, r"bias must be \[2, 4, 4\]"),
        ({"visible": inputs["visible"].float()}, "visible must be int32 or int64"),
        ({"rows": None}, "2 rows of queries, but 3 cache rows"),
        ({"num_splits": 0}, "num_splits must be at least 1"),
        ({"backend": "cuda"}, "backend='cuda' is unknown"),
    ]:
        with pytest.raises(ValueError, match=message):
            run(inputs, **changes)
    coded = make_inputs(device, bits=4)
    with pytest.raises(ValueError, match=r"scales must be \[3, 2, 12, 1\], got \[3, 2, 11, 1\]"):
        run(coded, scales=tuple(each[:, :, :-1] for each in coded["scales"]))


def test_gradients_are_refused_on_triton(device: torch.device) -> None:
    inputs = make_inputs(device)
    inputs["folded"].requires_grad_()
    with pytest.raises(RuntimeError, match="computes no gradients"):
        run(inputs, backend="triton")


def test_what_it_holds_while_it_runs_is_counted(device):
    """All but its result: no more, and not less by a tenth."""
    inputs = make_inputs(device, num_units=1024)
    with PeakMemory(device) as memory, torch.no_grad():
        memory.start()
        found = run(inputs, num_splits=1, backend="triton")
        memory.stop()
    held = memory.peak - memory.before - sum(each.numel() * each.element_size() for each in found)
    counted = latent_decode_bytes(2, 4, 4, 1024, 16, 4)
    assert 0.9 * counted < held <= 1.02 * counted
