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


# Dense tokens per second, computed independently.
@pytest.mark.parametrize(
    ("shape", "context", "dense_tokens"),
    [
        ("1b", 4096, 35.1e3),
        ("1b", 32_768, 4.4e3),
        ("1b", 131_072, 1.1e3),
        ("8b", 4096, 8.0e3),
        ("8b", 32_768, 1.0e3),
        ("8b", 131_072, 0.25e3),
    ],
)
def test_bounds_of_known_shapes(shape, context, dense_tokens):
    dense = dense_shape(shape)
    bound = best(roofline.dense_bound, dense, context)
    assert bound.tokens_per_s == pytest.approx(dense_tokens, rel=0.02)
    graft, split = (best(roofline.photon_bound, photon_shape(dense, s, 64), context) for s in ("graft", "split"))
    assert split.tokens_per_s > graft.tokens_per_s > 3 * bound.tokens_per_s


@pytest.mark.parametrize(("system", "halves"), [("graft", 1), ("graft-apart", 2)])
def test_a_graft_reads_everything_in_every_step(system, halves):
    """By hand: 32 layers with window 64 and 4 sinks, 4 of them with a latent of 2,048 numbers per 4 tokens."""
    photon, batch, context = photon_shape(dense_shape("8b"), system, 64), 7, 4096
    bound = roofline.photon_bound(photon, context, batch, H200)
    units = (context - 64) // 4
    cache = 2 * 2048 * (4 * units + 32 * (4 + 64 + 7))
    memory = 4 * (2 * 4 * 2048 * (2048 // halves) + 4 * 2048)
    weights = 2 * (accounting.dense_parameters(dense_shape("8b")) + memory)
    assert bound.cache_bytes == batch * cache
    assert bound.step_bytes == weights + batch * cache


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


@pytest.mark.parametrize("system", ["split", "paper"])
def test_levels_are_read_as_often_as_their_chunks_close(system):
    """One row reads a level's layers once per unit, many rows in nearly every step."""
    photon = photon_shape(dense_shape("demo"), system, 64)
    device = SimpleNamespace(bandwidth=1.0, flops=1e30, memory=1e30)
    one, many = (roofline.photon_bound(photon, 0, batch, device) for batch in (1, 1000))
    shape = accounting.costs_of(photon).shape
    constant = accounting.cache_bytes(photon, 0).constant
    idle = shared = 0.0
    for index, level in enumerate(photon.levels):
        span = photon.span(index + 1)
        idle += (1 - 1 / span) * (level["encoder_layers"] + (level["decoder_layers"] if index else 0)) * shape.layer * 2
        shared += (1 - 1 / span) * level["encoder_layers"] * (level["encoder_window"] or 0) * shape.kv * 2
    weights = 2 * accounting.photon_parameters(photon)
    assert one.step_bytes == pytest.approx(weights - idle + constant - shared)
    assert many.step_bytes == pytest.approx(weights + 1000 * (constant - shared))
    aligned = roofline.photon_bound(photon, 0, 1000, device, aligned=True)
    assert aligned.step_bytes == pytest.approx(weights - idle + 1000 * (constant - shared))


def test_predictions_are_written(tmp_path, monkeypatch):
    output = tmp_path / "roofline.json"
    arguments = ["roofline.py", "--shapes", "8b", "--contexts", "131072", "--batches", "1", "128"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--output", str(output)])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(TOOL), run_name="__main__")
    record = json.loads(output.read_text())
    assert record["claims"] == "upper bounds, nothing measured"
    rows = {(row["device"], row["batches"], row["batch"], row["system"]): row for row in record["rows"]}
    assert rows["H200", "equal", 1, "dense"]["decode_ratio"] == 1
    # 128 rows of 16 GiB each do not fit.
    assert ("H200", "equal", 128, "dense") not in rows
    assert rows["H200", "equal", 128, "graft"]["decode_ratio"] is None
    growing = rows["H200", "equal", 1, "graft"]["kv_growing_bytes_per_token"]
    assert growing == rows["H200", "equal", 1, "dense"]["kv_growing_bytes_per_token"] * 4 / (32 * 4)
