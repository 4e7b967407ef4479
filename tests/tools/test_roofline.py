"""Upper bounds against hand calculations and against the published table of bounds."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from lib import roofline
from lib.roofline import H200, Device
from lib.shapes import dense_shape, photon_shape
from photon_train import accounting

TOOL = Path(__file__).resolve().parents[2] / "tools" / "roofline.py"


def best(bound, config, context):
    return roofline.best(bound(config, context, batch, H200) for batch in roofline.batches())


# Dense tokens per second, and ratios to them: of window and sinks alone, and of a graft. Computed independently.
@pytest.mark.parametrize(
    ("shape", "context", "dense_tokens", "window", "graft"),
    [
        ("1b", 4096, 35.1e3, 9.2, 6.3),
        ("1b", 32_768, 4.4e3, 73, 16.4),
        ("1b", 131_072, 1.1e3, 294, 19.8),
        ("8b", 4096, 8.0e3, 6.7, 5.1),
        ("8b", 32_768, 1.0e3, 54, 16.1),
        ("8b", 131_072, 0.25e3, 216, 21.2),
    ],
)
def test_bounds_of_known_shapes(shape, context, dense_tokens, window, graft):
    dense = dense_shape(shape)
    bound = best(roofline.dense_bound, dense, context)
    assert bound.tokens_per_s == pytest.approx(dense_tokens, rel=0.02)
    for system, ratio in (("graft-window", window), ("graft", graft)):
        photon = best(roofline.photon_bound, photon_shape(dense, system, 64), context)
        assert photon.tokens_per_s / bound.tokens_per_s == pytest.approx(ratio, rel=0.02)
        assert photon.limit == "arithmetic"


def test_the_arithmetic_of_a_graft_by_hand():
    """Llama-3.2-1B at 32,768 tokens: 16 layers, 2 with memory, one latent of 1,024 numbers per 4 tokens."""
    layer = 2 * 2048 * 2048 + 2 * 512 * 2048 + 3 * 2048 * 8192
    head = 128_256 * 2048
    packing, folding = 1024 * 1024, 2 * 4 * 1024 * 32 * 64
    near = 16 * (4 + 64 + 3)  # sinks, the window, and what it reaches back to the unit's first token
    far = 2 * 32_704 * 1024 / 64  # folded queries are as wide as a latent, heads as 64 numbers
    flops = 2 * (16 * layer + head + 2 * (packing + folding)) + 4 * (near + far) * 32 * 64
    photon = best(roofline.photon_bound, photon_shape(dense_shape("1b"), "graft", 64), 32_768)
    assert photon.step_flops / photon.batch == pytest.approx(flops, rel=1e-9)
    assert photon.tokens_per_s == pytest.approx(800e12 / flops)


def test_a_bound_is_the_slower_of_reading_and_computing():
    config = dense_shape("demo")
    weights, cache = 2 * accounting.dense_parameters(config), 3 * accounting.dense_cache_bytes(config, 100)
    flops = 3 * accounting.dense_flops(config, 100)
    slow_memory = roofline.dense_bound(config, 100, 3, Device("a", 1e3, 1e30, 1e30))
    assert slow_memory.limit == "bandwidth"
    assert slow_memory.tokens_per_s == pytest.approx(3 * 1e3 / (weights + cache))
    slow_compute = roofline.dense_bound(config, 100, 3, Device("b", 1e30, 1e3, 1e30))
    assert slow_compute.limit == "arithmetic"
    assert slow_compute.tokens_per_s == pytest.approx(3 * 1e3 / flops)
    assert roofline.dense_bound(config, 100, 3, Device("c", 1.0, 1.0, weights + cache - 1)) is None


@pytest.mark.parametrize(("system", "maps"), [("graft", 1), ("graft-apart", 2), ("graft-window", 0)])
def test_chunkers_are_read_as_often_as_units_leave_the_window(system, maps):
    photon = photon_shape(dense_shape("demo"), system, 64)
    device = SimpleNamespace(bandwidth=1.0, flops=1e30, memory=1e30)
    constant = accounting.cache_bytes(photon, 0).constant
    weights = 2 * accounting.photon_parameters(photon)
    # 8 tokens with keys and values of 4 heads of 32; packed apart, each kind by a map of a quarter of the size.
    chunker = 2 * (8 * 256 * 256 // maps + 256) if maps else 0
    for batch in (1, 3, 1000):
        read = roofline.photon_bound(photon, 0, batch, device).step_bytes
        assert read == pytest.approx(weights - (7 / 8) ** batch * chunker + batch * constant)


def test_the_default_reads_its_cells_alone():
    """Llama-3.2-1B: 1% of 16 layers of 8 heads is 9 cells, each alone in its layer but for one."""
    photon = photon_shape(dense_shape("1b"), "graft-cells", 64)
    counts = sorted(map(len, photon.memory_cells.values()))
    assert counts == [1, 1, 1, 1, 1, 1, 1, 2] and (photon.chunk_size, photon.memory_bits) == (2, 4)
    (chunkers,) = roofline.occasional(photon, 32_768)
    one, two = (width * (2 * width + 1) for width in (2 * 64, 2 * 2 * 64))
    assert (chunkers.unit_tokens, chunkers.weights, chunkers.cached) == (2, 7 * one + two, 0)
    grown = [roofline.photon_bound(photon, n, 1, H200).cache_bytes for n in (32_768, 32_770)]
    assert grown[1] - grown[0] == 9 * 2 * (32 + 2)


@pytest.mark.parametrize("system", ["split", "paper"])
def test_levels_are_read_as_often_as_their_chunks_close(system):
    """One row reads a level's layers once per unit, many rows in nearly every step."""
    photon = photon_shape(dense_shape("demo"), system, 64)
    device = SimpleNamespace(bandwidth=1.0, flops=1e30, memory=1e30)
    one, many = (roofline.photon_bound(photon, 0, batch, device) for batch in (1, 1000))
    shape = accounting.Shape.of(photon.base_config)
    constant = accounting.cache_bytes(photon, 0).constant
    idle = shared = 0.0
    for index, level in enumerate(photon.levels):
        span = photon.unit_tokens(index + 1)
        idle += (1 - 1 / span) * (level["encoder_layers"] + (level["decoder_layers"] if index else 0)) * shape.layer * 2
        shared += (1 - 1 / span) * level["encoder_layers"] * (level["encoder_window"] or 0) * shape.kv * 2
    weights = 2 * accounting.photon_parameters(photon)
    assert one.step_bytes == pytest.approx(weights - idle + constant - shared)
    assert many.step_bytes == pytest.approx(weights + 1000 * (constant - shared))


def test_predictions_are_written(tmp_path, monkeypatch):
    output = tmp_path / "roofline.json"
    arguments = ["roofline.py", "--shapes", "8b", "--contexts", "131072", "--batches", "1", "256"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--output", str(output)])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(TOOL), run_name="__main__")
    record = json.loads(output.read_text())
    assert record["claims"] == "upper bounds, nothing measured"
    rows = {(row["device"], row["batches"], row["batch"], row["system"]): row for row in record["rows"]}
    assert rows["H200", "equal", 1, "dense"]["decode_ratio"] == 1
    # 256 rows of 16 GiB each do not fit.
    assert ("H200", "equal", 256, "dense") not in rows
    assert rows["H200", "equal", 256, "graft-window"]["decode_ratio"] is None
    growing = rows["H200", "equal", 1, "graft"]["kv_growing_bytes_per_token"]
    assert growing == rows["H200", "equal", 1, "dense"]["kv_growing_bytes_per_token"] * 4 / (32 * 4)
