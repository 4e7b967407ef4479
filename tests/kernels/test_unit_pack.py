from __future__ import annotations

import pytest
import torch
from torch import Tensor

from photon_kernels import unit_pack

BACKENDS = ["torch", "triton"]
SHAPES = {
    "one cell": dict(),
    "several cells, odd sizes": dict(heads=(2, 0), kv_heads=3, head_dim=24, tokens=3),
    "all heads": dict(heads=(0, 1, 2), kv_heads=3),
    "units of one token": dict(tokens=1),
    "keys and values apart": dict(heads=(1, 0), is_joint=False),
    "more rows than a tile has": dict(batch=19, cache_rows=21),
    "one row": dict(batch=1, cache_rows=1),
    "blocks": dict(per_block=4),
    "odd blocks, apart": dict(per_block=5, is_joint=False, heads=(0, 1)),
    "rotated in part": dict(rotated=8),
    "rotated in part, neighbours together": dict(rotated=8, is_interleaved=True),
    "neighbours together": dict(is_interleaved=True),
    "not rotated": dict(rotated=0),
    "rows at one position": dict(one_position=True),
}


def make_inputs(
    device: torch.device,
    batch: int = 3,
    cache_rows: int = 5,
    heads: tuple[int, ...] = (1,),
    kv_heads: int = 2,
    head_dim: int = 16,
    tokens: int = 2,
    is_joint: bool = True,
    per_block: int = 0,
    rotated: int | None = None,
    is_interleaved: bool = False,
    one_position: bool = False,
    bits: int = 16,
    dtype: torch.dtype = torch.float32,
) -> dict:
    """Rings that hold NaN wherever no unit's token lies, rows in no order, and a store whose every byte is known."""
    generator = torch.Generator().manual_seed(0)
    slots_in_ring, capacity = 7, 10
    rows = torch.randperm(cache_rows, generator=generator)[:batch]
    slots = torch.stack([torch.randperm(slots_in_ring, generator=generator)[:tokens] for _ in range(batch)])
    keys, values = torch.full((2, cache_rows, kv_heads, slots_in_ring, head_dim), float("nan"))
    for row, its_slots in zip(rows, slots, strict=True):
        for states in (keys, values):
            for head in heads:
                states[row, head, its_slots] = torch.randn(tokens, head_dim, generator=generator)
    width = len(heads) * head_dim
    inputs = tokens * width * (2 if is_joint else 1)
    # Views of one matrix where keys and values are packed together, as the model has them.
    weights = torch.randn(2 * width, inputs, generator=generator) * inputs**-0.5
    biases = torch.randn(2 * width, generator=generator)
    angles = torch.randn(1 if one_position else batch, tokens, (head_dim if rotated is None else rotated) // 2)
    pairs = angles.repeat_interleave(2, -1) if is_interleaved else torch.cat([angles, angles], dim=-1)
    size = head_dim * bits // 8 // (2 if bits == 16 else 1)
    shape = (cache_rows, len(heads), capacity)
    block_table = None
    if per_block:
        count = capacity // per_block + 1
        block_table = torch.randperm(cache_rows * count, generator=generator).view(cache_rows, count)
        shape = (cache_rows * count, len(heads), per_block)
    stored = [torch.full((*shape, size), 7.0).to(dtype if bits == 16 else torch.uint8) for _ in range(2)]
    if bits < 16:
        stored += [torch.full((*shape, 1), 7.0, dtype=torch.bfloat16) for _ in range(2)]
    units = torch.randint(0, capacity, (batch,), generator=generator)
    moved = {"keys": keys, "values": values, "cosine": pairs.cos(), "sine": pairs.sin()}
    return {
        **{name: states.to(device, dtype) for name, states in moved.items()},
        "rows": rows.to(device),
        "slots": slots.to(device),
        "heads": torch.tensor(heads, device=device),
        "weights": tuple(weights.to(device, dtype).chunk(2)),
        "biases": tuple(biases.to(device, dtype).chunk(2)),
        "targets": [states.to(device) for states in stored],
        "units": units.to(device),
        "block_table": None if block_table is None else block_table.to(device),
        "bits": bits,
        "is_interleaved": is_interleaved,
    }


def packed(inputs: dict, backend: str) -> list[Tensor]:
    """The store afterwards; the inputs stay as they are."""
    targets = [states.clone() for states in inputs["targets"]]
    unit_pack(**{**inputs, "targets": targets}, backend=backend)
    return targets


def latents_by_hand(inputs: dict) -> Tensor:
    """Vectors ``[n, 2, m, D]`` of each row's unit, in float64, number by number."""
    keys, values, cosine, sine = (inputs[name].double().cpu() for name in ("keys", "values", "cosine", "sine"))
    heads, (batch, tokens), head_dim = inputs["heads"].tolist(), inputs["slots"].shape, keys.shape[3]
    found = torch.zeros(batch, 2, len(heads), head_dim).double()
    for row in range(batch):
        angle, given = row if len(cosine) > 1 else 0, [[], []]
        for token in range(tokens):
            slot, cache_row = int(inputs["slots"][row, token]), int(inputs["rows"][row])
            for head in heads:
                turned = keys[cache_row, head, slot].clone()
                for pair in range(cosine.shape[2] // 2):
                    first, second = 2 * pair, 2 * pair + 1
                    if not inputs["is_interleaved"]:
                        first, second = pair, pair + cosine.shape[2] // 2
                    c, s = cosine[angle, token, first], sine[angle, token, first]
                    x, y = keys[cache_row, head, slot, first], keys[cache_row, head, slot, second]
                    turned[first], turned[second] = c * x + s * y, c * y - s * x
                given[0].append((token, 0, head, turned))
                given[1].append((token, 1, head, values[cache_row, head, slot]))
        order = lambda entry: (entry[0], entry[1], heads.index(entry[2]))  # noqa: E731
        joint = torch.cat([entry[3] for entry in sorted(given[0] + given[1], key=order)])
        for half, (weight, bias) in enumerate(zip(inputs["weights"], inputs["biases"], strict=True)):
            own = joint if weight.shape[1] == len(joint) else torch.cat([entry[3] for entry in given[half]])
            result = weight.double().cpu() @ own + bias.double().cpu()
            found[row, half] = result.view(len(heads), head_dim)
    return found


def read_back(inputs: dict, targets: list[Tensor]) -> tuple[Tensor, Tensor]:
    """What the store holds of each row's unit, ``[n, 2, m, D]``, and the largest difference of two levels."""
    batch, bits, vectors, steps = len(inputs["rows"]), inputs["bits"], [], []
    for row in range(batch):
        block, inside = int(inputs["rows"][row]), int(inputs["units"][row])
        if inputs["block_table"] is not None:
            per_block = targets[0].shape[2]
            block, inside = int(inputs["block_table"][block, inside // per_block]), inside % per_block
        halves = [targets[half][block, :, inside].cpu() for half in range(2)]
        if bits == 16:
            vectors.append(torch.stack(halves).double())
            continue
        scales = torch.stack([targets[2 + half][block, :, inside].double().cpu() for half in range(2)])
        codes = torch.stack(halves).int()
        if bits == 4:
            codes = torch.cat([codes % 16, codes // 16], dim=-1)
        vectors.append((codes - (2**bits - 1) / 2) * scales)
        steps.append(scales)
    return torch.stack(vectors), torch.stack(steps) if steps else torch.zeros(1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_equals_sums_by_hand(shape: dict, backend: str, device: torch.device) -> None:
    inputs = make_inputs(device, **shape)
    targets = packed(inputs, backend)
    found, _ = read_back(inputs, targets)
    torch.testing.assert_close(found, latents_by_hand(inputs), atol=2e-5, rtol=2e-5)
    # Nothing else is written.
    written = sum(int((after != before).sum()) for after, before in zip(targets, inputs["targets"], strict=True))
    assert written <= found.numel()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", ["one cell", "several cells, odd sizes", "odd blocks, apart", "blocks"])
def test_codes_lie_within_a_level(shape: str, bits: int, backend: str, device: torch.device) -> None:
    inputs = make_inputs(device, **SHAPES[shape], bits=bits)
    expected = latents_by_hand(inputs)
    found, step = read_back(inputs, packed(inputs, backend))
    # Half a level from rounding, and what the largest numbers lose where the stored scale was rounded down.
    assert bool(((found - expected).abs() <= (0.5 + 2 ** (bits - 1) * 2**-7) * step + 1e-5).all())
    largest = expected.abs().amax(-1, keepdim=True) / 2 ** (bits - 1)
    torch.testing.assert_close(step, largest, atol=0.0, rtol=2**-7)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [16, 4])
def test_half_precision(bits: int, dtype: torch.dtype, backend: str, device: torch.device) -> None:
    inputs = make_inputs(device, dtype=dtype, bits=bits, batch=5, heads=(1, 0))
    expected = latents_by_hand(inputs)
    found, step = read_back(inputs, packed(inputs, backend))
    assert bool(((found - expected).abs() <= 0.6 * step + 2e-2 * (1 + expected.abs())).all())


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_without_a_unit_are_skipped(backend: str, device: torch.device) -> None:
    inputs = make_inputs(device, per_block=4, bits=4)
    inputs["units"][1] = -1
    before = [states.clone() for states in inputs["targets"]]
    targets = packed(inputs, backend)
    row, table = int(inputs["rows"][1]), inputs["block_table"]
    for after, old in zip(targets, before, strict=True):
        assert torch.equal(after[table[row]], old[table[row]]) and not torch.equal(after, old)
    empty = {name: inputs[name][:0] for name in ("rows", "slots", "units", "cosine", "sine")}
    assert all(map(torch.equal, packed({**inputs, **empty}, backend), before))


def test_a_vector_of_zeros_has_finite_codes(device: torch.device) -> None:
    inputs = make_inputs(device, bits=4)
    inputs["weights"], inputs["biases"] = ([part * 0 for part in inputs[name]] for name in ("weights", "biases"))
    for backend in BACKENDS:
        found, step = read_back(inputs, packed(inputs, backend))
        assert bool((step > 0).all()) and float(found.abs().max()) < 1e-20


def test_what_does_not_fit_is_named(device: torch.device) -> None:
    inputs = make_inputs(device, bits=4)
    for changes, message in [
        ({"keys": inputs["keys"][:, :1]}, r"expected keys and values \[R, Hkv, N, D\] of even D"),
        ({"slots": inputs["slots"][:2]}, r"slots must be int32 or int64 \[3, 2\]"),
        ({"sine": inputs["sine"][:, :1]}, r"cosine and sine must be \[3 or 1, 2, Dr\]"),
        ({"weights": tuple(part[:, 1:] for part in inputs["weights"])}, r"weights must be \[16, 32 or 64\]"),
        ({"weights": tuple(part.double() for part in inputs["weights"])}, "weights must be torch.float32 as the keys"),
        ({"bits": 16}, "bits=16 must be 16 with two targets"),
        ({"bits": 8}, r"targets must be \[.., 1, U, 16\]"),
        ({"backend": "cuda"}, "backend='cuda' is unknown"),
    ]:
        with pytest.raises(ValueError, match=message):
            unit_pack(**{**inputs, **changes})
