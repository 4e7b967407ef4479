"""The starting values of a graft's memory, fitted in closed form to the dense model's own keys and values.

For every memory layer a reduced-rank regression (Izenman 1975): of all linear maps of that many numbers, the one from
the S tokens' keys and values (unrotated) that predicts best what the layer needs of those tokens:

- keys, as queries beyond the window see them: rotated back by the distance, in the mean over the distances that occur
  (the least-squares answer for keys without position). An error counts as it changes the scores: by the second moment
  of the layer's queries.
- values. An error counts as it changes the layer's output: by its output projection.

Both are scaled to the same total, and the means go into the maps' biases, where they cost no cache. Of the bases in
which a latent can be written, it gets one in which an error of any number counts the same, turned at random: then no
number has a larger range than others, and few bits lose least (as rotations do in QuaRot, arXiv 2404.00456). Its size
makes the weights of both maps equally large, so that training changes them at one rate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from photon_train.accounting.graft import Graft
from photon_train.conversion.dense_attention import DenseAttention
from photon_train.layouts import LAYOUTS
from photon_train.models import PhotonForCausalLM
from photon_train.models.attention_photon import Segment, unrotate
from photon_train.models.families_photon import is_interleaved
from photon_train.models.memory_photon import join_heads, take_heads

# Of the mean variance of a layer's keys and values: keeps directions that the text hardly shows out of the fit.
RIDGE = 1e-4
# Of the mean cost of a latent's directions: the least that one is taken to have.
_LEAST_COST = 1e-2
# A latent of a memory layer: the layer, and the latent's number.
Latent = tuple[int, int]


@dataclass
class _Recorder:
    """A segment that keeps what its layer was asked and had, rotated."""

    segment: Segment
    seen: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None

    def attend(self, module, query, key, value, scale, softcap=None, sink_logits=None):
        self.seen = query, key, value
        return self.segment.attend(module, query, key, value, scale, softcap, sink_logits)


@dataclass
class _Moments:
    """First and second moments, as sums over `count` samples."""

    count: int = 0
    sums: dict[str, torch.Tensor] = field(default_factory=dict)

    def add(self, **sums: torch.Tensor) -> None:
        for key, value in sums.items():
            self.sums[key] = self.sums.get(key, 0) + value.double()

    def mean(self, key: str) -> torch.Tensor:
        return self.sums[key] / self.count


@torch.no_grad()
def fit_latents(
    model: PhotonForCausalLM,
    batches: Sequence[torch.Tensor],
    on_batch: Callable[[int, int], None] = lambda done, total: None,
) -> list[str]:
    """Set the chunkers and converters of a freshly converted model's memory.

    Args:
        model: Run as the dense model; changed in place.
        batches: Token ids ``[B, T]``, real text without padding, twice as long as the window or longer. Take at least
            as many units as a unit has numbers (S x 2 Hkv D).
        on_batch: Is told after each batch how many were read, and of how many.

    Returns:
        Names of the parameters that were set.
    """
    was_training = model.training
    model.eval()
    names = []
    groups = list(_groups(model))
    for index, group in enumerate(groups):
        moments = {latent: _Moments() for latent in group}
        queries = {layer: _Moments() for layer, _ in group}
        for number, batch in enumerate(batches, start=1):
            _measure(model, batch.to(model.device), moments, queries)
            on_batch(index * len(batches) + number, len(groups) * len(batches))
        for layer, number in group:
            names += _fit(model, layer, number, moments.pop((layer, number)), queries[layer])
    model.train(was_training)
    return names


def _groups(model: PhotonForCausalLM) -> Iterator[list[Latent]]:
    """All latents, so many at a time as the bound on the moments' memory allows, with a pass over the text each."""
    config = model.config
    latents = [(layer, number) for layer in config.memory_layers for number in range(config.latents_per_unit)]
    size = Graft(config).fit_at_once
    for begin in range(0, len(latents), size):
        yield latents[begin : begin + size]


def _measure(
    model: PhotonForCausalLM, batch: torch.Tensor, moments: dict[Latent, _Moments], queries: dict[int, _Moments]
) -> None:
    """Add a batch to the moments of each latent's numbers (x) and of what queries need of them (y), and to the second
    moments ``[Hkv, D, D]`` of the unrotated queries that meet each key head beyond the window."""
    config, attention = model.config, DenseAttention(batch)
    segments = attention.dense(config)
    for layer in queries:
        segments[layer] = _Recorder(segments[layer])
    model.model(batch, use_cache=False, photon_segments=segments)
    # In text that the window nearly holds, what lies in its first half stands for what lies beyond.
    begin = min(config.window, batch.shape[1] // 2)
    interleaved = is_interleaved(config)
    for layer, seen in queries.items():
        memory = model.model.layers[layer].self_attn.memory
        query, key, value = segments[layer].seen
        segments[layer].seen = None
        query = take_heads(query, memory.query_heads)
        key, value = (take_heads(states, memory.cells) for states in (key, value))
        rotary = model.model.rotation(attention.index, layer)
        away = _mean_rotation(model, layer, begin, batch.shape[1])
        key = unrotate(key, rotary, interleaved)
        far = unrotate(query, rotary, interleaved)[:, :, begin:].unflatten(1, (key.shape[1], -1)).float()
        seen.count += far.shape[0] * far.shape[2] * far.shape[3]
        seen.add(qq=torch.einsum("bhgtd,bhgte->hde", far, far))
        have = _units(key, value, config.chunk_size, config.latents_per_unit)
        need = _units(_turn(key, away, interleaved), value, config.chunk_size, config.latents_per_unit)
        for number, (x, y) in enumerate(zip(have, need, strict=True)):
            if (found := moments.get((layer, number))) is not None:
                found.count += len(x)
                found.add(x=x.sum(0), y=y.sum(0), xx=x.T @ x, xy=x.T @ y)


def _units(keys: torch.Tensor, values: torch.Tensor, chunk_size: int, count: int) -> list[torch.Tensor]:
    """For each of a unit's `count` latents the numbers of whole units, ``[B * U, S * width / count]`` in fp32, as the
    chunker reads them: (token, kind, head, dimension)."""
    joined = join_heads(keys, values).float()
    whole = joined.shape[1] // chunk_size * chunk_size
    units = joined[:, :whole].unflatten(1, (-1, chunk_size)).chunk(count, dim=-1)
    return [part.flatten(2).flatten(0, 1) for part in units]


def _mean_rotation(model: PhotonForCausalLM, layer: int, begin: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean cosine and sine over the distances from `begin` to `end`, ``[1, 1, D]`` each."""
    cosine, sine = model.model.rotation(torch.arange(begin, end, device=model.device)[None], layer)
    return cosine.float().mean(1, keepdim=True), sine.float().mean(1, keepdim=True)


def _turn(keys: torch.Tensor, away: tuple[torch.Tensor, torch.Tensor], interleaved: bool) -> torch.Tensor:
    """Unrotated keys ``[B, H, E, D]`` rotated back by the mean distance, in fp32."""
    return unrotate(keys.float(), away, interleaved)


def _root(matrix: torch.Tensor) -> torch.Tensor:
    """Symmetric square root of a positive semi-definite matrix (or a batch of them)."""
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp(min=0).sqrt().unsqueeze(-2) @ vectors.mT


def _weights(model: PhotonForCausalLM, layer: int, queries: _Moments) -> torch.Tensor:
    """Square roots of what errors of a layer's keys and values count, ``[2, m, D, D]``."""
    attention = model.model.layers[layer].self_attn
    heads, size = model.config.num_key_value_heads, model.config.head_dim
    (out_proj,) = LAYOUTS[model.config.base_model_type].named(["o_proj"])
    out = getattr(attention, out_proj).weight.double().unflatten(1, (heads, -1, size))[:, list(attention.memory.cells)]
    values = torch.einsum("ohgd,ohge->hde", out, out)
    return torch.stack([_root(_floored(queries.mean("qq"))), _root(_floored(values))])


def _floored(counts: torch.Tensor) -> torch.Tensor:
    """``[m, D, D]`` with what hardly counts raised to a hundredth of the mean: other queries will come."""
    mean = counts.diagonal(dim1=1, dim2=2).mean(1)
    return counts + 1e-2 * mean[:, None, None] * torch.eye(counts.shape[1], device=counts.device)


def _fit(model: PhotonForCausalLM, layer: int, number: int, found: _Moments, queries: _Moments) -> list[str]:
    memory, prefix = model.model.layers[layer].self_attn.memory, f"model.layers.{layer}.self_attn.memory"
    errors = _weights(model, layer, queries)
    if model.config.latents_per_unit == 2:
        errors = errors[number : number + 1]
    chunker, converter = memory.chunker.maps[number], memory.converter.maps[number]
    fitted = {
        "chunker.maps.{}.weight": chunker.weight,
        "chunker.maps.{}.bias": chunker.bias,
        "converter.maps.{}.weight": converter.weight,
        "converter.maps.{}.bias": converter.bias,
    }
    for parameter, value in zip(fitted.values(), _regress(found, errors, chunker.out_features), strict=True):
        parameter.copy_(value)
    return [f"{prefix}.{name.format(number)}" for name in fitted]


def _regress(found: _Moments, errors: torch.Tensor, rank: int) -> tuple[torch.Tensor, ...]:
    """The map from a unit's n numbers to `rank`, ``[rank, n]`` and bias ``[rank]``, and the one back, ``[n, rank]`` and
    ``[n]``.

    Args:
        found: Used up, since its matrices are large.
        errors: Square roots of what errors count, ``[kinds, m, D, D]``.
    """
    mean_x, mean_y = found.mean("x"), found.mean("y")
    xx = found.sums.pop("xx").div_(found.count).addr_(mean_x, mean_x, alpha=-1)
    xx.diagonal().add_(RIDGE * xx.diagonal().mean())
    factor = torch.linalg.cholesky(xx)  # x @ inverse(factor).T has unit covariance
    del xx
    xy = found.sums.pop("xy").div_(found.count).addr_(mean_x, mean_y, alpha=-1)
    xy = torch.linalg.solve_triangular(factor, xy, upper=False)
    # The best directions are those of the largest eigenvalues, which fp32 finds in half of the memory.
    directions = torch.linalg.eigh(_weighted(xy.float(), errors.float()))[1][:, -rank:].double()
    pack, unpack = torch.linalg.solve_triangular(factor.T, directions, upper=True).T, xy.T @ directions
    # What an error of the latent costs; directions that hardly cost anything keep the maps small.
    counts, basis = torch.linalg.eigh(_weighted(xy, errors, directions))
    spread = counts.clamp(min=_LEAST_COST * float(counts.mean())).sqrt()
    turn = _random_rotation(rank).to(pack.device) @ torch.diag(spread) @ basis.T
    pack, unpack = turn @ pack, torch.linalg.solve(turn.T, unpack.T).T
    # An optimiser's step is as large for every weight: neither map may be so small that it is lost in the first steps.
    scale = (unpack.square().mean() / pack.square().mean()) ** 0.25
    pack, unpack = scale * pack, unpack / scale
    return pack, -pack @ mean_x, unpack, mean_y


def _random_rotation(size: int) -> torch.Tensor:
    """An orthogonal matrix ``[size, size]``, always the same."""
    noise = torch.randn(size, size, generator=torch.Generator().manual_seed(size), dtype=torch.float64)
    return torch.linalg.qr(noise)[0]


def _weighted(xy: torch.Tensor, errors: torch.Tensor, directions: torch.Tensor | None = None) -> torch.Tensor:
    """Sum over tokens of ``xy W W' xy'``, keys and values each scaled to the same trace; along `directions`, if any."""
    kinds, heads, size, _ = errors.shape
    by_kind = xy.unflatten(1, (-1, kinds, heads, size))
    count = len(xy) if directions is None else directions.shape[1]
    total = torch.zeros(count, count, dtype=xy.dtype, device=xy.device)
    for kind, error in enumerate(errors):
        seen = torch.einsum("xshd,hde->xshe", by_kind[:, :, kind], error).flatten(1)
        scale = 1 / float(seen.norm()) ** 2
        if directions is not None:
            seen = directions.T @ seen
        total.addmm_(seen, seen.T, alpha=scale)
    return total
