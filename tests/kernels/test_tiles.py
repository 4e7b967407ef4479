"""Tables of measured tile sizes: used by every launcher that has a choice, and refused if nothing can run with them."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import torch

from photon_kernels import _tiles as tables
from photon_kernels import (
    gather_chunk_project,
    latent_decode,
    paged_decode_attention,
    window_decode_attention,
)
from photon_kernels._attention_config import AttentionConfig, choose_num_splits


@pytest.fixture
def table(tmp_path, monkeypatch) -> Iterator:
    """Writes what `PHOTON_KERNEL_TILES` then names."""

    def write(content: object) -> None:
        (tmp_path / "tiles.json").write_text(json.dumps(content))
        monkeypatch.setenv(tables.VARIABLE, str(tmp_path / "tiles.json"))
        tables._read.cache_clear()

    yield write
    monkeypatch.undo()
    tables._read.cache_clear()


def test_splits_fill_the_gpu_unless_they_would_be_short():
    """Two programs a multiprocessor (264) are wanted, of 256 elements at least and of 64 splits at most."""
    assert [choose_num_splits(count, 1) for count in (0, 511, 512, 1023, 10**6)] == [1, 1, 2, 3, 64]
    assert [choose_num_splits(10**6, programs) for programs in (5, 8, 132, 200, 264, 999)] == [53, 33, 2, 2, 1, 1]


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


def runs(device: torch.device) -> dict:
    """Each kernel with a choice at a small shape, by backend."""
    states = {name: random(2, 2, 70, 16).to(device) for name in ("k", "v")}
    positions = torch.arange(70, device=device).expand(2, -1).contiguous()
    first, last = torch.tensor([3, 40], device=device), torch.tensor([[60], [66]], device=device)
    q, seen = random(2, 4, 1, 16).to(device), torch.tensor([[70], [33]], device=device)
    folded, bias = random(2, 4, 3, 64).to(device), random(2, 4, 3).to(device)
    visible, rows = torch.tensor([70, 41], device=device), torch.tensor([1, 0, 2], device=device)
    chunks, weight = random(3, 2, 48).to(device), random(32, 96).to(device)
    scale = torch.tensor(0.5, device=device)
    return {
        "window_decode": lambda backend: window_decode_attention(
            q, *states.values(), positions, first, last, 0.3, backend=backend
        ),
        "paged_decode": lambda backend: paged_decode_attention(
            q, *states.values(), seen, 0.3, num_splits=2, backend=backend
        ),
        "latent_decode": lambda backend: (
            latent_decode(folded, bias, *states.values(), visible, 0.3, num_splits=2, backend=backend).mixed
        ),
        "chunker": lambda backend: gather_chunk_project(chunks, rows, weight, scale, backend=backend),
    }


@pytest.mark.parametrize("kernel", ["window_decode", "paged_decode", "latent_decode", "chunker"])
def test_other_tiles_give_the_same(kernel, device):
    run = runs(device)[kernel]
    expected = run("torch")
    with tables.trial({}) as launched:
        run("triton")
    ((case, default),) = launched.items()
    assert case.startswith(f"{kernel} ")
    changes = [change for change in tables.candidates(default) if change["num_warps"] == 4][::2]
    assert {change["block_n"] for change in changes} - {default.block_n}
    for change in changes[:3]:
        with tables.trial({case: change}):
            torch.testing.assert_close(run("triton"), expected, atol=2e-5, rtol=2e-5)


def test_what_is_tried_is_possible_and_another_than_what_is_there():
    default = AttentionConfig(block_n=16, block_m=32, block_d=64, num_warps=4, num_stages=3)
    changes = list(tables.candidates(default))
    assert len(changes) == 2 * 2 * 3 - 1 and {change["block_n"] for change in changes} == {16, 32}
    assert all(default._replace(**change) != default for change in changes)


def test_a_launch_uses_the_table_of_its_device(table, monkeypatch, device):
    import photon_kernels.window_decode.triton as module

    asked = []
    run, plain = runs(device)["window_decode"], module.tuned
    monkeypatch.setattr(module, "tuned", lambda *args, **shape: asked.append(plain(*args, **shape)) or asked[-1])
    case = "window_decode slots=70 queries=2 dim=16 bytes=4"
    name = tables.device_name(device)
    for content in ({name: {case: {"block_n": 32, "num_warps": 2}}}, {"another": {case: {"block_n": 32}}}, {name: {}}):
        table({"devices": content})
        run("triton")
    assert asked[0] == asked[1]._replace(block_n=32, num_warps=2) and asked[1] == asked[2]
    assert asked[1].block_n != 32


@pytest.mark.parametrize(
    "entry",
    [
        {"block_n": 8},
        {"block_n": 48},
        {"block_d": 32},
        {"num_warps": 3},
        {"num_stages": 0},
        {"blocks": 16},
        {"block_n": "64"},
    ],
    ids=str,
)
def test_impossible_tiles_are_refused(entry, table, device):
    case = "window_decode slots=70 queries=2 dim=16 bytes=4"
    table({"devices": {tables.device_name(device): {case: entry}}})
    with pytest.raises(ValueError, match="tile table, 'window_decode slots=70.*is not possible"):
        runs(device)["window_decode"]("triton")


@pytest.mark.parametrize("content", [[], {"device": {}}, {"devices": {"cpu": {"window_decode": 64}}}], ids=str)
def test_what_is_no_table_is_refused(content, table, device):
    table(content)
    with pytest.raises(ValueError, match="PHOTON_KERNEL_TILES=.*is no table of tile sizes"):
        runs(device)["window_decode"]("triton")
