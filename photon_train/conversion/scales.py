"""Scales of a hierarchical model's new paths, from norms measured on text.

The mean of C states is shorter than the states, and a decoder copied from upper dense layers expects states of another
norm than the embeddings it is fed. Norms are compared by their medians: a few positions of a trained model, mostly the
first of a text, carry norms a hundred times larger and would decide a mean.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch

from photon_train.errors import PhotonError

Norms = dict[str, list[torch.Tensor]]


@torch.no_grad()
def calibrate(model: Any, batches: Iterable[torch.Tensor]) -> dict[str, float]:
    """Set the scales of a freshly converted model, level by level, bottom-up and then top-down.

    A chunker's scale makes the median norm of its units that of the states they summarise; a decoder's input scale
    makes what it reads from below as long as its slots. Each measurement sees the scales that were set before it.

    Args:
        model: A converted `HierarchicalForCausalLM`; changed in place.
        batches: Token ids ``[B, T]``, real text without padding, at least two top units long.

    Returns:
        Name of each parameter that was set -> its value.

    Raises:
        PhotonError: if the text is too short, or a norm is zero or not finite.
    """
    batches = [batch.to(model.device) for batch in batches]
    unit = model.config.top_unit_tokens
    if not batches or min(batch.shape[1] for batch in batches) < 2 * unit:
        raise PhotonError(
            f"calibration needs text of at least {2 * unit} tokens (two top units): give longer sequences"
        )
    was_training = model.training
    model.eval()
    scales: dict[str, float] = {}
    levels = model.model.levels
    for index, level in enumerate(levels):
        measure = partial(_watch_chunker, level.chunker, model.config.unit_tokens(index + 1))
        scales[f"model.levels.{index}.chunker.scale"] = _rescale(model, batches, level.chunker.scale, measure, index)
    for index in reversed(range(len(levels))):
        scale, slots = levels[index].decoder.input_scale, levels[index].converter
        measure = partial(
            _watch_decoder, scale, model.config.unit_tokens(index), slots, model.config.unit_tokens(index + 1)
        )
        name = f"model.levels.{index}.decoder.input_scale.weight"
        scales[name] = _rescale(model, batches, scale.weight, measure, index)
    model.train(was_training)
    return scales


def _rescale(
    model: Any,
    batches: Sequence[torch.Tensor],
    scale: torch.nn.Parameter,
    measure: Callable[[Norms, int], list],
    index: int,
) -> float:
    """Multiply `scale` by wanted / actual median norm, and return it."""
    norms: Norms = {"wanted": [], "actual": []}
    for batch in batches:
        handles = measure(norms, batch.shape[1])
        try:
            model.model(batch, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
    scale.mul_(median_ratio(norms["wanted"], norms["actual"], f"level {index + 1}"))
    return scale.item()


def median_ratio(wanted: Sequence[torch.Tensor], actual: Sequence[torch.Tensor], what: str) -> float:
    """Median of all `wanted` norms over that of all `actual` ones, each a list of ``[n]``.

    Args:
        what: Names what is calibrated, for the message.

    Raises:
        PhotonError: if the ratio is zero or not finite.
    """
    above, below = torch.cat(list(wanted)).median(), torch.cat(list(actual)).median()
    ratio = (above / below).item()
    if not 0 < ratio < float("inf"):
        raise PhotonError(
            f"calibration of {what}: median norms {above:.3g} (wanted) and {below:.3g} give no scale: use a sound "
            "checkpoint"
        )
    return ratio


def _record(norms: Norms, key: str, states: torch.Tensor) -> None:
    norms[key].append(states.float().norm(dim=-1).flatten())


def _watch_chunker(chunker: torch.nn.Module, unit: int, norms: Norms, length: int) -> list:
    def hook(module, inputs, output):
        _record(norms, "wanted", inputs[0][:, : length // unit])
        _record(norms, "actual", output[:, : length // unit])

    return [chunker.register_forward_hook(hook)]


def _watch_decoder(
    input_scale: torch.nn.Module,
    child: int,
    slots: torch.nn.Module,
    unit: int,
    norms: Norms,
    length: int,
) -> list:
    def wanted(module, inputs, output):
        # The first is conditioned by the start state, which is zero.
        _record(norms, "wanted", output[:, 1 : length // unit])

    def actual(module, inputs, output):
        _record(norms, "actual", output[:, : length // child])

    return [slots.register_forward_hook(wanted), input_scale.register_forward_hook(actual)]
