"""QLoRA (arXiv 2305.14314): the dense model's linear layers frozen in 4 bits under adapters in full precision.

The weights are those of bitsandbytes: NormalFloat 4 in blocks of 64, whose factors are quantised again. Embedding,
head, norms, biases and the new modules stay as they are. What is exported is never the rounded weights:
`collect.gather_full_model` adds the adapters to the weights that the checkpoint holds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel

from photon_train.accounting.shape import Shape, dense_parameters
from photon_train.config import TrainSettings
from photon_train.errors import PhotonError
from photon_train.training.lora import inside, new_module_names

_INSTALL = "pip install bitsandbytes"
_KIND = {"quant_type": "nf4", "compress_statistics": True}
# Weights under one factor. Where rows are no multiple of it, bitsandbytes' CPU kernels apply factors to wrong weights.
BLOCK = 64
_COMPUTE = {"bf16": torch.bfloat16, "fp16": torch.float16}


def check_base_bits(settings: TrainSettings, dense: Any) -> None:
    """Check `train.base_bits` against a dense configuration (an object or a dict), before anything is loaded.

    Raises:
        PhotonError: for a model with experts, whose stacked weights bitsandbytes does not take, or one without a layer
            of whole blocks.
    """
    if settings.base_bits == 16:
        return
    shape = Shape.of(dense)
    if shape.mixture is not None:
        experts = shape.layers * shape.mixture.count * shape.mixture.expert
        raise PhotonError(
            f"train.base_bits={settings.base_bits} would leave {experts / dense_parameters(dense):.0%} of the model in "
            f"full precision: its {experts:,} parameters of experts are held stacked, and bitsandbytes takes matrices "
            "alone: set it to 16"
        )
    if all(inputs % BLOCK for _, inputs in shape.modules.values()):
        raise PhotonError(
            f"train.base_bits={settings.base_bits}: no linear layer of the model has inputs in a multiple of {BLOCK}, "
            "the block of the 4-bit type: set it to 16"
        )


def check_machine(settings: TrainSettings, device: torch.device, zero_stage: int) -> None:
    """Check that `train.base_bits` can be served here, by quantising a small matrix and passing a gradient through it.

    Args:
        device: Where the model is trained.
        zero_stage: 0 without DeepSpeed.

    Raises:
        PhotonError: if weights are divided among the processes, or bitsandbytes is missing or does not work here.
    """
    bits = settings.base_bits
    if bits == 16:
        return
    if zero_stage == 3:
        raise PhotonError(
            f"train.base_bits={bits} with ZeRO-3, which would divide packed weights that it cannot put together again: "
            "take accelerate_configs/zero2.yaml, or set train.base_bits=16"
        )
    try:
        from bitsandbytes.nn import Linear4bit
    except ImportError as error:
        raise PhotonError(
            f"train.base_bits={bits} needs the package bitsandbytes: {_INSTALL}, or set it to 16"
        ) from error
    except Exception as error:  # it looks for CUDA's libraries while it is imported
        raise _does_not_work(bits, device, error) from error
    try:
        with torch.enable_grad():
            states = torch.ones(1, 64, device=device, requires_grad=True)
            layer = _quantised(nn.Linear(64, 64, bias=False), Linear4bit, device, torch.float32)
            layer(states).sum().backward()
    except Exception as error:  # a backend that is missing, or built for another CUDA
        raise _does_not_work(bits, device, error) from error
    if not bool(states.grad.isfinite().all()):
        raise _does_not_work(bits, device, "gradients are not finite")


def _does_not_work(bits: int, device: torch.device, error: Exception | str) -> PhotonError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return PhotonError(
        f"train.base_bits={bits}: bitsandbytes does not work on {device} ({reason}): {_INSTALL} --upgrade, or set it "
        "to 16"
    )


def _quantised(linear: nn.Linear, kind: type[nn.Linear], device: torch.device, compute: torch.dtype) -> nn.Linear:
    """The layer with its weight in 4 bits, on `device`."""
    with torch.device("meta"):
        layer = kind(linear.in_features, linear.out_features, bias=False, compute_dtype=compute, **_KIND)
    weight = linear.weight.detach()
    layer.weight = type(layer.weight)(weight, requires_grad=False, module=layer, **_KIND).to(device)
    # On some CPUs it packs weights anew when it evaluates, and then passes no gradient through them.
    layer.support_avx512bf16_for_cpu = False
    if linear.bias is not None:
        layer.bias = nn.Parameter(linear.bias.detach().to(device), requires_grad=False)
    return layer.train(linear.training)


def quantise_base(model: PreTrainedModel, settings: TrainSettings, accelerator: Accelerator) -> PreTrainedModel:
    """Put the linear layers of `model` in 4 bits on the training's device, one at a time; the others stay where they
    are.

    Those of new modules, the head and layers whose inputs are no multiple of `BLOCK` keep their precision. With
    `train.base_bits` of 16 nothing is done.

    Args:
        model: Loaded from the checkpoint that the training starts from, without adapters.
        settings: Gives the bits.
        accelerator: From `make_accelerator`, which has checked that bitsandbytes works.

    Returns:
        `model`, ready for `lora.add_lora`.
    """
    if settings.base_bits == 16:
        return model
    from bitsandbytes.nn import Linear4bit

    new, head = new_module_names(model), model.get_output_embeddings()
    compute = _COMPUTE.get(accelerator.mixed_precision, torch.float32)
    for name, module in list(model.named_modules()):
        is_whole = isinstance(module, nn.Linear) and module.in_features % BLOCK == 0
        if is_whole and module is not head and not inside(name, new):
            model.set_submodule(name, _quantised(module, Linear4bit, accelerator.device, compute))
    model.is_loaded_in_4bit = True  # peft asks for its adapters on such layers
    return model


def is_quantised(module: nn.Module) -> bool:
    """Whether a module's weight is packed into codes, which no sum can be taken with."""
    return getattr(getattr(module, "weight", None), "quant_state", None) is not None


class StoredWeights:
    """The weights of a checkpoint as they were before any rounding, read one by one.

    Args:
        directory: The checkpoint that a training started from, in safetensors.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._files: dict[str, Path] = {}
        for file in sorted(directory.glob("model*.safetensors")):
            with safe_open(file, framework="pt") as opened:
                self._files.update(dict.fromkeys(opened.keys(), file))

    def __call__(self, name: str) -> torch.Tensor:
        """The tensor `name`, on the CPU.

        Raises:
            PhotonError: if there is none.
        """
        if name not in self._files:
            raise PhotonError(f"{self.directory} lacks tensor {name}, which the adapters are to be added to")
        with safe_open(self._files[name], framework="pt") as opened:
            return opened.get_tensor(name)
