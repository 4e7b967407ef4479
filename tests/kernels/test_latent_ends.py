"""What comes before and after the attention over latents: folded queries, and outputs joined with the near keys'."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from photon_kernels import latent_outputs, latent_queries

BACKENDS = ["torch", "triton"]
SHAPES = {
    "one cell": dict(),
    "cells of several heads": dict(cells=2, group=3, all_heads=9, head_dim=24, chunk_size=3),
    "keys and values apart": dict(cells=2, num_latents=2),
    "one head, one row, units of one token": dict(group=1, all_heads=2, chunk_size=1, batch=1),
    "more rows than a tile has": dict(batch=21, group=4, all_heads=8),
    "wide latents": dict(cells=3, group=2, all_heads=6, head_dim=40),
    "rotated in part": dict(rotated=8),
    "rotated in part, neighbours together": dict(rotated=8, is_interleaved=True),
    "neighbours together": dict(is_interleaved=True),
    "not rotated": dict(rotated=0),
    "rows at one position": dict(one_position=True),
}


def make_inputs(
    device: torch.device,
    batch: int = 3,
    cells: int = 1,
    group: int = 2,
    all_heads: int = 4,
    head_dim: int = 16,
    chunk_size: int = 2,
    num_latents: int = 1,
    rotated: int | None = None,
    is_interleaved: bool = False,
    one_position: bool = False,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor | bool]:
    """Heads in no order; maps are views of a converter's matrix, as the model has them."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    halves = 2 // num_latents
    width = halves * cells * head_dim
    converter = normal(chunk_size, halves, cells, head_dim, width) * width**-0.5
    biases = normal(chunk_size, halves, cells, head_dim)
    angles = normal(1 if one_position else batch, (head_dim if rotated is None else rotated) // 2) * 3
    pairs = angles.repeat_interleave(2, -1) if is_interleaved else torch.cat([angles, angles], dim=-1)
    given = {
        "query": normal(batch, all_heads, head_dim),
        "key_map": converter[:, 0],
        "key_bias": biases[:, 0],
        "cosine": pairs.cos(),
        "sine": pairs.sin(),
        "mixed": normal(batch, cells * group, chunk_size, width),
        "value_map": converter[:, -1],
        "value_bias": biases[:, -1],
        "out": normal(batch, all_heads, head_dim),
    }
    inputs = {name: states.to(device, dtype) for name, states in given.items()}
    precise = {
        "mass": torch.rand(batch, cells * group, chunk_size, generator=generator),
        "lse": normal(batch, cells * group) * 3,
        "out_lse": normal(batch, all_heads) * 3,
    }
    inputs |= {name: states.to(device) for name, states in precise.items()}
    heads = torch.randperm(all_heads, generator=generator)[: cells * group]
    return inputs | {"heads": heads.to(device), "is_interleaved": is_interleaved}


def fold(inputs: dict, backend: str) -> tuple[Tensor, Tensor]:
    names = ("query", "heads", "key_map", "key_bias", "cosine", "sine", "is_interleaved")
    return latent_queries(*(inputs[name] for name in names), backend=backend)


def join(inputs: dict, backend: str) -> tuple[Tensor, Tensor]:
    """Outputs and log-sum-exps of all heads; the inputs stay as they are."""
    out, out_lse = inputs["out"].clone(), inputs["out_lse"].clone()
    names = ("mixed", "mass", "lse", "heads", "value_map", "value_bias")
    latent_outputs(*(inputs[name] for name in names), out, out_lse, backend=backend)
    return out, out_lse


def unrotated(query: list[float], cosine: list[float], sine: list[float], is_interleaved: bool) -> list[float]:
    """A head turned back, pair by pair."""
    turned, half = list(query), len(cosine) // 2
    for pair in range(half):
        first, second = (2 * pair, 2 * pair + 1) if is_interleaved else (pair, pair + half)
        c, s, x, y = cosine[first], sine[first], query[first], query[second]
        turned[first], turned[second] = c * x + s * y, c * y - s * x
    return turned


def folded_by_hand(inputs: dict) -> tuple[Tensor, Tensor]:
    exact = {name: value.double().cpu() for name, value in inputs.items() if isinstance(value, Tensor)}
    batch, heads = len(exact["query"]), inputs["heads"].tolist()
    chunk_size, cells, _, width = exact["key_map"].shape
    folded, bias = torch.zeros(batch, len(heads), chunk_size, width).double(), None
    bias = torch.zeros(batch, len(heads), chunk_size).double()
    for row in range(batch):
        angle = row if len(exact["cosine"]) > 1 else 0
        for place, head in enumerate(heads):
            cosine, sine = exact["cosine"][angle].tolist(), exact["sine"][angle].tolist()
            query = unrotated(exact["query"][row, head].tolist(), cosine, sine, inputs["is_interleaved"])
            cell = place // (len(heads) // cells)
            for dim, number in enumerate(query):
                folded[row, place] += number * exact["key_map"][:, cell, dim]
                bias[row, place] += number * exact["key_bias"][:, cell, dim]
    return folded, bias


def joined_by_hand(inputs: dict) -> tuple[Tensor, Tensor]:
    exact = {name: value.double().cpu() for name, value in inputs.items() if isinstance(value, Tensor)}
    out, out_lse, heads = exact["out"].clone(), exact["out_lse"].clone(), inputs["heads"].tolist()
    chunk_size, cells, _, _ = exact["value_map"].shape
    for row in range(len(out)):
        for place, head in enumerate(heads):
            cell = place // (len(heads) // cells)
            far = sum(
                exact["value_map"][token, cell] @ exact["mixed"][row, place, token]
                + exact["mass"][row, place, token] * exact["value_bias"][token, cell]
                for token in range(chunk_size)
            )
            sizes = [math.exp(float(lse)) for lse in (exact["out_lse"][row, head], exact["lse"][row, place])]
            if not sum(sizes):
                out[row, head], out_lse[row, head] = 0.0, -torch.inf
                continue
            near = exact["out"][row, head] if sizes[0] else torch.zeros_like(far)
            out[row, head] = (sizes[0] * near + sizes[1] * far) / sum(sizes)
            out_lse[row, head] = math.log(sum(sizes))
    return out, out_lse


def assert_close(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], tolerance: float) -> None:
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine.double().cpu(), theirs, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_both_equal_sums_by_hand(shape: dict, backend: str, device: torch.device) -> None:
    inputs = make_inputs(device, **shape)
    assert_close(fold(inputs, backend), folded_by_hand(inputs), 2e-5)
    assert_close(join(inputs, backend), joined_by_hand(inputs), 2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype, backend: str, device: torch.device) -> None:
    inputs = make_inputs(device, dtype=dtype, cells=2, batch=5)
    folded, bias = fold(inputs, backend)
    assert folded.dtype == dtype and bias.dtype == torch.float32
    assert_close((folded, bias), folded_by_hand(inputs), 3e-2)
    assert_close(join(inputs, backend), joined_by_hand(inputs), 3e-2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_parts_that_see_nothing_weigh_nothing(backend: str, device: torch.device) -> None:
    inputs = make_inputs(device)
    first, second = inputs["heads"].tolist()
    inputs["out_lse"][0, first], inputs["out"][0, first] = -torch.inf, torch.nan  # far keys alone
    inputs["lse"][1, 0], inputs["mixed"][1, 0], inputs["mass"][1, 0] = -torch.inf, 0.0, 0.0  # near keys alone
    inputs["out_lse"][2, second], inputs["lse"][2, 1] = -torch.inf, -torch.inf  # none
    inputs["mixed"][2, 1], inputs["mass"][2, 1] = 0.0, 0.0
    out, out_lse = join(inputs, backend)
    assert_close((out, out_lse), joined_by_hand(inputs), 2e-5)
    assert not out[2, second].any() and out_lse[2, second] == -torch.inf
    torch.testing.assert_close(out[1, first], inputs["out"][1, first])
    others = [head for head in range(inputs["out"].shape[1]) if head not in (first, second)]
    assert torch.equal(out[:, others], inputs["out"][:, others])


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows_give_none(backend: str, device: torch.device) -> None:
    inputs = make_inputs(device, one_position=True)
    rows = ("query", "mixed", "mass", "lse", "out", "out_lse")
    inputs |= {name: inputs[name][:0] for name in rows}
    assert [states.shape[0] for states in (*fold(inputs, backend), *join(inputs, backend))] == [0] * 4


def test_what_does_not_fit_is_named(device: torch.device) -> None:
    inputs = make_inputs(device)
    for changes, message in [
        ({"query": inputs["query"][0]}, r"expected a query \[n, Hq, D\]"),
        ({"key_map": inputs["key_map"].double()}, r"key_map must be torch.float32 \[S, m, 16, C\], got torch.float64"),
        ({"key_bias": inputs["key_bias"][:1]}, r"key_bias must be \[2, 1, 16\]"),
        ({"heads": inputs["heads"].float()}, "heads must be int32 or int64"),
        ({"heads": inputs["heads"][:0]}, "0 query heads cannot be shared out over 1 cells"),
        ({"sine": inputs["sine"][:2]}, r"cosine and sine must be \[3 or 1, Dr\]"),
        ({"cosine": inputs["cosine"][:, :5], "sine": inputs["sine"][:, :5]}, "5 dimensions of 16 cannot be rotated"),
    ]:
        with pytest.raises(ValueError, match=message):
            fold({**inputs, **changes}, "torch")
    for changes, message in [
        ({"value_bias": inputs["value_bias"][:1]}, r"value_bias must be \[2, 1, 16\]"),
        ({"mass": inputs["mass"][:, :1]}, r"mixed, mass and lse must be \[3, 2, 2, 32\], \[3, 2, 2\] and \[3, 2\]"),
        ({"out_lse": inputs["out_lse"][:, :1]}, r"expected out \[n, Hq, D\] and out_lse \[n, Hq\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            join({**inputs, **changes}, "torch")
    with pytest.raises(ValueError, match="backend='cuda' is unknown"):
        join(inputs, "cuda")
