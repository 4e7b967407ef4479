"""The starting values of a latent memory, fitted in closed form to the dense model's own keys and values.

For every source layer a reduced-rank regression (Izenman 1975): of all linear maps of that many numbers, the one from
the S tokens' keys and values (unrotated) that predicts best what its reading layers need of those tokens:

- keys, as queries beyond the window see them: rotated back by the distance, in the mean over the distances that occur
  (the least-squares answer for keys without position). An error counts as it changes the scores: by the second moment
  of the layer's queries.
- values. An error counts as it changes the layer's output: by its output projection.

Both are scaled to the same total, and the means go into the converters' biases, where they cost no cache.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

import torch

from photon_train.models import PhotonForCausalLM
from photon_train.models.attention_photon import FullSpan, KeyValue
from photon_train.models.latent_photon import join_heads

# Of the mean variance of the source's keys and values: keeps directions that the text hardly shows out of the fit.
RIDGE = 1e-4


@dataclass
class _Recorder(FullSpan):
    """Full attention that keeps what each of `layers` was asked and had."""

    layers: Collection[int] = ()
    seen: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def attend(self, layer, query, key, value, scale, dropout, sliding_window):
        if layer in self.layers:
            self.seen[layer] = (query, key, value)
        return super().attend(layer, query, key, value, scale, dropout, sliding_window)


class _Moments:
    """First and second moments of units' keys and values at a source (x) and of what its readers need (y)."""

    def __init__(self) -> None:
        self.count = 0
        self.sums: dict[object, torch.Tensor] = {}

    def add(self, key: object, value: torch.Tensor) -> None:
        self.sums[key] = self.sums.get(key, 0) + value.double()

    def mean(self, key: object) -> torch.Tensor:
        return self.sums[key] / self.count


@torch.no_grad()
def fit_latents(model: PhotonForCausalLM, batches: Iterable[torch.Tensor]) -> list[str]:
    """Set the chunkers and converters of a freshly converted model's latent memory.

    Args:
        model: Its token decoder is run at full attention; changed in place.
        batches: Token ids ``[B, T]``, real text without padding, twice as long as the window or longer. Take at least
            as many units as a unit has numbers (S x 2 Hkv D).

    Returns:
        Names of the parameters that were set; none for a model without a latent memory.
    """
    config = model.config
    if config.memory_pooling != "latent" or not config.memory_layers:
        return []
    moments = {source: _Moments() for source in config.source_levels}
    queries = {layer: _Moments() for layer in config.memory_layers}
    was_training = model.training
    model.eval()
    for batch in batches:
        _measure(model, batch.to(model.device), moments, queries)
    model.train(was_training)
    names = []
    for source, found in moments.items():
        names += _fit(model, source, found, queries)
    return names


def _measure(model, batch, moments: dict[int, _Moments], queries: dict[int, _Moments]) -> None:
    config, recorder = model.config, _Recorder(layers=model.config.memory_layers)
    decoder, embeds = model.model.levels[0].decoder, model.model.embed_tokens(batch)
    position = torch.arange(batch.shape[1], device=batch.device)[None]
    rotary = model.model.rotary_emb(embeds, position)
    decoder(decoder.input_scale(embeds), rotary, [recorder] * len(decoder.layers))
    # In text that the window nearly holds, what lies in its first half stands for what lies beyond.
    begin = min(config.window, batch.shape[1] // 2)
    away = _mean_rotation(model, begin, batch.shape[1])
    content: dict[int, KeyValue] = {}
    for layer in config.memory_layers:
        query, key, value = recorder.seen[layer]
        content[layer] = (model.model.turn_back(key, position), value)
        # ``[Hkv, D, D]``: second moment of the queries that meet each key head.
        far = model.model.turn_back(query, position)[:, :, begin:].unflatten(1, (key.shape[1], -1))
        queries[layer].count += far.shape[0] * far.shape[2] * far.shape[3]
        queries[layer].add("qq", torch.einsum("bhgtd,bhgte->hde", far.float(), far.float()))
    for source, found in moments.items():
        x = _units(content[source], config.span(config.source_levels[source]))
        found.count += len(x)
        found.add("x", x.sum(0))
        found.add("xx", x.T @ x)
        for layer, at in config.source_of_layer.items():
            if at == source:
                key, value = content[layer]
                y = _units((_turn(key, away), value), config.span(config.source_levels[source]))
                found.add(("y", layer), y.sum(0))
                found.add(("xy", layer), x.T @ y)


def _units(states: KeyValue, span: int) -> torch.Tensor:
    """Keys and values ``[B, Hkv, T, D]`` by unit, ``[B * U, S * 2 * Hkv * D]`` in fp32, as the chunker reads them."""
    joined = join_heads(*states).float()
    count = joined.shape[1] // span
    return joined[:, : count * span].unflatten(1, (count, span)).flatten(2).flatten(0, 1)


def _mean_rotation(model: PhotonForCausalLM, begin: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean cosine and sine over the distances from `begin` to `end`, ``[D]`` each."""
    distance = torch.arange(begin, end, device=model.device)[None]
    cosine, sine = model.model.rotation(torch.zeros((), device=model.device), distance)
    return cosine[0].mean(0), sine[0].mean(0)


def _turn(keys: torch.Tensor, away: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Keys ``[B, H, E, D]`` turned back by the mean distance."""
    first, second = keys.chunk(2, dim=-1)
    return keys * away[0] - torch.cat([-second, first], dim=-1) * away[1]


def _root(matrix: torch.Tensor) -> torch.Tensor:
    """Symmetric square root of a positive semi-definite matrix (or a batch of them)."""
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp(min=0).sqrt().unsqueeze(-2) @ vectors.mT


def _weights(model, layer: int, queries: _Moments) -> torch.Tensor:
    """Square roots of what errors of layer `layer`'s keys and values count, ``[2 * Hkv, D, D]``."""
    attention = model.model.levels[0].decoder.layers[layer].self_attn
    heads, size = model.config.num_key_value_heads, model.config.head_dim
    out = attention.o_proj.weight.double().unflatten(1, (heads, -1, size))  # [d, Hkv, group, D]
    values = torch.einsum("ohgd,ohge->hde", out, out)
    return torch.cat([_root(queries.mean("qq")), _root(values)])


def _fit(model, source: int, found: _Moments, queries: dict[int, _Moments]) -> list[str]:
    decoder, config = model.model.levels[0].decoder, model.config
    readers = [layer for layer, at in config.source_of_layer.items() if at == source]
    chunker = decoder.latent[str(source)]
    weights = {layer: _weights(model, layer, queries[layer]).unflatten(0, (2, -1)) for layer in readers}
    numbers = torch.arange(chunker.span * chunker.width).view(chunker.span, len(chunker.parts), -1)
    prefix, names = "model.levels.0.decoder", []
    for number, part in enumerate(chunker.parts):
        kinds = slice(0, 2) if len(chunker.parts) == 1 else slice(number, number + 1)
        own = numbers[:, number].flatten()
        errors = {layer: weights[layer][kinds] for layer in readers}
        pack, unpack = _regress(found, own, errors, part.out_features)
        part.weight.copy_(pack)
        names.append(f"{prefix}.latent.{source}.parts.{number}.weight")
        for layer, (matrix, bias) in unpack.items():
            converter = decoder.memory[str(layer)].parts[number]
            converter.weight.copy_(matrix)
            converter.bias.copy_(bias)
            names += [f"{prefix}.memory.{layer}.parts.{number}.{kind}" for kind in ("weight", "bias")]
    return names


def _regress(found: _Moments, own: torch.Tensor, errors: dict[int, torch.Tensor], rank: int):
    """The map from the numbers `own` of a unit to `rank`, and by layer its matrix back and bias.

    Args:
        errors: By layer, square roots of what errors count, ``[kinds, Hkv, D, D]``; the numbers are ordered
            (token, kind, head, dimension).
    """
    mean_x = found.mean("x")[own]
    xx = found.mean("xx")[own][:, own] - torch.outer(mean_x, mean_x)
    xx += RIDGE * xx.diagonal().mean() * torch.eye(len(xx), dtype=xx.dtype, device=xx.device)
    values, vectors = torch.linalg.eigh(xx)
    white = vectors * values.clamp(min=1e-12).rsqrt()  # x @ white has unit covariance
    seen, mixed = {}, 0
    for layer, error in errors.items():
        mean_y = found.mean(("y", layer))[own]
        xy = white.T @ (found.mean(("xy", layer))[own][:, own] - torch.outer(mean_x, mean_y))
        seen[layer] = (xy, mean_y)
        mixed = mixed + _weighted(xy, error)
    directions = torch.linalg.eigh(mixed)[1][:, -rank:]
    pack, back = (white @ directions).T, {}
    for layer, (xy, mean_y) in seen.items():
        unpack = (directions.T @ xy).T
        back[layer] = unpack, mean_y - unpack @ (pack @ mean_x)
    return pack, back


def _weighted(xy: torch.Tensor, errors: torch.Tensor) -> torch.Tensor:
    """Sum over tokens of ``xy W W' xy'``, keys and values each scaled to the same trace."""
    kinds, heads, size, _ = errors.shape
    parts = xy.unflatten(1, (-1, kinds, heads, size))
    total = 0
    for kind, error in enumerate(errors):
        part = torch.einsum("xshd,hde->xshe", parts[:, :, kind], error).flatten(1)
        total = total + part @ part.T / part.pow(2).sum()
    return total
