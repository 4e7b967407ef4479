"""The trained model as plain tensors, whatever training sharded or wrapped."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from peft.tuners.lora import LoraLayer, ParamWrapper
from peft.utils import ModulesToSaveWrapper
from torch import nn

from photon_train.errors import PhotonError
from photon_train.training.base_bits import is_quantised
from photon_train.training.lora import base_model
from photon_train.training.losses import TrainingObjective


@contextmanager
def _gathered(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Make ZeRO-3 shards whole inside the block (every process takes part); plain parameters are whole already."""
    sharded = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not sharded:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(sharded):
        yield


# Gives the stored weight of a name; None where no weight was rounded.
Stored = Callable[[str], torch.Tensor]


def _merged_tensors(module: nn.Module, prefix: str, stored: Stored | None) -> Iterator[tuple[str, torch.Tensor]]:
    """Entries of the state dict that `module` would have after merging, one gathered layer at a time."""
    if isinstance(module, ModulesToSaveWrapper):
        yield from _merged_tensors(module.modules_to_save[module.active_adapters[0]], prefix, stored)
    elif isinstance(module, ParamWrapper):
        with _gathered(module.parameters()):
            yield from _merged_parameters(module, prefix)
    elif isinstance(module, LoraLayer):
        with _gathered(module.parameters()):
            base = module.get_base_layer()
            weight, bias = _unrounded(base, prefix, stored)
            # Summed in fp32 and rounded once.
            deltas = [module.get_delta_weight(adapter).float() for adapter in module.active_adapters]
            yield f"{prefix}weight", sum(deltas, weight.to(deltas[0].device).float()).to(weight.dtype)
            if bias is not None:
                yield f"{prefix}bias", bias
    elif is_quantised(module):
        weight, bias = _unrounded(module, prefix, stored)
        yield f"{prefix}weight", weight
        if bias is not None:
            yield f"{prefix}bias", bias
    else:
        own = {name: parameter for name, parameter in module._parameters.items() if parameter is not None}
        with _gathered(own.values()):
            yield from ((f"{prefix}{name}", parameter) for name, parameter in own.items())
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                yield f"{prefix}{name}", buffer
        for name, child in module._modules.items():
            if child is not None:
                yield from _merged_tensors(child, f"{prefix}{name}.", stored)


def _unrounded(linear: nn.Module, prefix: str, stored: Stored | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A linear layer's weight, which adapters are added to, and its bias: its own, or where it is rounded the stored
    ones (bitsandbytes casts biases in place too).
    """
    if not is_quantised(linear):
        return linear.weight, linear.bias
    if stored is None:
        raise PhotonError(
            f"{prefix}weight is quantised (train.base_bits): give gather_full_model the weights that it was made from"
        )
    return stored(f"{prefix}weight"), None if linear.bias is None else stored(f"{prefix}bias")


def _merged_parameters(module: ParamWrapper, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Of a layer whose parameters have adapters, each parameter; wrappers stand around each other, one for each."""
    deltas, layer = {}, module
    while isinstance(layer, ParamWrapper):
        deltas[layer.parameter_name] = [layer.get_delta_weight(adapter).float() for adapter in layer.active_adapters]
        layer = layer.base_layer
    for name, parameter in layer._parameters.items():
        yield f"{prefix}{name}", sum(deltas.pop(name, ()), parameter.float()).to(parameter.dtype)


@torch.no_grad()
def gather_full_model(
    accelerator: Accelerator, model: nn.Module, stored: Stored | None = None
) -> dict[str, torch.Tensor] | None:
    """The state dict of the trained model with adapters merged, on the CPU of the main process.

    Layers are gathered and merged one at a time, so that no device holds more than its share and one layer. The
    names are the base model's own: `load_state_dict` of a fresh model takes them. Every process must call it.

    Args:
        accelerator: The one that trained the model.
        model: `TrainResult.model`, or a model that no training has touched.
        stored: Gives by name the weights that `base_bits.quantise_base` has rounded, as they were
            (`base_bits.StoredWeights`): adapters are added to these, not to the rounded ones.

    Returns:
        The state dict on the main process (tied weights share one tensor), None on the others.

    Raises:
        PhotonError: if weights are quantised and `stored` is not given or lacks one.
    """
    model = accelerator.unwrap_model(model)
    if isinstance(model, TrainingObjective):
        model = model.model
    state: dict[str, torch.Tensor] = {}
    copies: dict[int, torch.Tensor] = {}
    for name, tensor in _merged_tensors(base_model(model), "", stored):
        if accelerator.is_main_process:
            if isinstance(tensor, nn.Parameter) and id(tensor) in copies:
                state[name] = copies[id(tensor)]
                continue
            state[name] = tensor.detach().to("cpu", copy=True)
            copies[id(tensor)] = state[name]
    return state if accelerator.is_main_process else None
