"""ZeRO-3 without a whole model in every process: the main one reads the weights, all take their shards of them."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from accelerate import Accelerator, init_empty_weights
from accelerate.utils import broadcast_object_list
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from photon_train.errors import PhotonError

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether a training divides the weights among the processes (ZeRO-3)."""
    plugin = accelerator.deepspeed_plugin
    return plugin is not None and plugin.zero_stage == 3


def empty_model(directory: Path) -> PreTrainedModel:
    """The causal LM of a checkpoint with parameters on the meta device, which take no memory, and its buffers."""
    config = AutoConfig.from_pretrained(directory)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=config.dtype or torch.float32)
    model.tie_weights()
    if (directory / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(directory)
    return model.eval()


def shard(accelerator: Accelerator, module: nn.Module) -> None:
    """Divide the parameters of `module` among the processes as ZeRO-3 does, one at a time; every process calls it.

    Values are the main process's: what others hold may be on the meta device. DeepSpeed would do the same when training
    starts, from a module that each process holds whole, on its GPU.

    Raises:
        PhotonError: if the processes hold different modules.
    """
    dtype = _DTYPES.get(accelerator.mixed_precision)
    described = [
        (name, tuple(parameter.shape), dtype or parameter.dtype) for name, parameter in module.named_parameters()
    ]
    (main,) = broadcast_object_list([described])
    if [entry[:2] for entry in main] != [entry[:2] for entry in described]:
        raise PhotonError("the processes have loaded different models: do all machines see the same files?")
    dtypes = {name: its for name, _, its in main}
    converter: nn.Parameter | None = None
    done: dict[int, nn.Parameter] = {}
    for name, owner, key in _places(module):
        old = owner._parameters[key]
        if id(old) in done:  # tied
            owner._parameters[key] = done[id(old)]
            continue
        parameter = old
        if old.is_meta:
            values = torch.empty(old.shape, dtype=dtypes[name], device=accelerator.device)
            parameter = owner._parameters[key] = nn.Parameter(values, old.requires_grad)
        parameter.data = parameter.data.to(dtypes[name])
        if converter is None:
            _begin(accelerator, parameter)
            converter = parameter
        else:
            converter.convert_to_zero_parameters(param_list=[parameter])
        done[id(old)] = parameter


def _places(module: nn.Module) -> list[tuple[str, nn.Module, str]]:
    """Full name, module and name in it of each parameter; of one that is tied, every place, the first one's name."""
    names: dict[int, str] = {}
    found = []
    for prefix, owner in module.named_modules():
        for key, parameter in owner._parameters.items():
            if parameter is not None:
                names.setdefault(id(parameter), f"{prefix}.{key}" if prefix else key)
                found.append((names[id(parameter)], owner, key))
    return found


def _begin(accelerator: Accelerator, parameter: nn.Parameter) -> None:
    """Divide the first parameter, which can then divide others."""
    import deepspeed

    holder = nn.Module()
    holder.register_parameter("first", parameter)
    config = copy.deepcopy(accelerator.deepspeed_plugin.deepspeed_config)
    deepspeed.zero.Init(module=holder, config_dict_or_path=config, dtype=parameter.dtype)
