"""Upper bounds of decoding speed from bytes and FLOPs (a roofline), stated before anything is measured.

A decoding step takes at least the time to read the weights and caches that it uses, and at least the time of its
arithmetic; a batch must fit into memory. Launches, synchronisation and imperfect overlap come on top: what is measured
lies below.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from photon_train import accounting
from photon_train.accounting.graft import Graft

MAX_BATCH = 1024


@dataclass(frozen=True)
class Device:
    """What bounds a device: bytes per second, FLOP per second, bytes of memory."""

    name: str
    bandwidth: float
    flops: float
    memory: float


# Bandwidth from the data sheets; matrix products reach about 80% of the 990 TFLOP/s that they state for bf16.
H200 = Device("H200", 4.8e12, 800e12, 139 * 2**30)
H100 = Device("H100", 3.35e12, 800e12, 78 * 2**30)
DEVICES = {device.name: device for device in (H100, H200)}


@dataclass(frozen=True)
class Bound:
    """The best that a batch can do.

    Attributes:
        batch: Sequences.
        tokens_per_s: Of all of them.
        limit: What binds: `bandwidth` or `arithmetic`.
        step_bytes, step_flops: Read and computed per step.
        cache_bytes: Of the batch.
    """

    batch: int
    tokens_per_s: float
    limit: str
    step_bytes: float
    step_flops: float
    cache_bytes: float


def dense_bound(dense: Any, context: int, batch: int, device: Device, dtype_bytes: int = 2) -> Bound | None:
    """Bound of the dense model at one batch; None if it does not fit."""
    weights = accounting.dense_parameters(dense) * dtype_bytes
    cache = batch * accounting.dense_cache_bytes(dense, context, dtype_bytes)
    flops = batch * accounting.dense_flops(dense, context)
    return _bound(batch, weights, weights + cache, cache, flops, device)


@dataclass(frozen=True)
class Occasional:
    """What a row needs once per unit, in elements: `weights` of the model, and `cached` ones of its own."""

    unit_tokens: int
    weights: int
    cached: int = 0


def occasional(photon: Any, context: int) -> list[Occasional]:
    """What a decoding step after `context` tokens does not always read.

    A graft's chunkers run when a unit leaves the window; of a hierarchical model the layers of level l, and the cache
    of its encoder, when one of its chunks closes.
    """
    costs = accounting.costs_of(photon)
    shape = costs.shape
    if isinstance(costs, Graft):
        widths = [2 * len(heads) * shape.head_dim for heads in photon.memory_cells.values()]
        chunkers = sum(width * (photon.chunk_size * width // photon.latents_per_unit + 1) for width in widths)
        return [Occasional(photon.chunk_size, chunkers)]
    found = []
    for index, level in enumerate(photon.levels):
        span = photon.unit_tokens(index + 1)
        layers = level["encoder_layers"] + (level["decoder_layers"] if index else 0)
        units = context // span if level["encoder_window"] is None else level["encoder_window"]
        found.append(Occasional(span, layers * shape.layer, level["encoder_layers"] * units * shape.kv))
    return found


def photon_bound(photon: Any, context: int, batch: int, device: Device, dtype_bytes: int = 2) -> Bound | None:
    """Bound of a PHOTON model at one batch; None if it does not fit.

    Rows are of any phase: what a row needs once per S tokens is read in a share of ``1 - (1 - 1/S) ** batch`` of the
    steps if it is weights, and once per S tokens of each row if it is cached.
    """
    weights = accounting.photon_parameters(photon) * dtype_bytes
    cache = accounting.cache_bytes(photon, context, dtype_bytes)
    read_weights, read_cache = float(weights), float(cache.growing + cache.constant)
    for one in occasional(photon, context):
        read_weights -= (1 - 1 / one.unit_tokens) ** batch * one.weights * dtype_bytes
        read_cache -= (1 - 1 / one.unit_tokens) * one.cached * dtype_bytes
    flops = batch * accounting.photon_flops(photon, context)
    step = read_weights + batch * read_cache
    return _bound(batch, weights, step, batch * cache.total, flops, device)


def _bound(batch: int, weights: float, step_bytes: float, cache: float, flops: float, device: Device) -> Bound | None:
    if weights + cache > device.memory:
        return None
    reading, computing = step_bytes / device.bandwidth, flops / device.flops
    limit = "bandwidth" if reading >= computing else "arithmetic"
    return Bound(batch, batch / max(reading, computing), limit, step_bytes, flops, cache)


def best(bounds: Iterable[Bound | None]) -> Bound | None:
    """The fastest of those that fit."""
    return max((bound for bound in bounds if bound), key=lambda bound: bound.tokens_per_s, default=None)


def batches(limit: int = MAX_BATCH) -> list[int]:
    """Batches to try, up to `limit`: powers of two, and steps of an eighth between them."""
    tried = {2**power * eighth // 8 for power in range(limit.bit_length()) for eighth in range(8, 16)}
    return sorted(batch for batch in tried if batch <= limit)
