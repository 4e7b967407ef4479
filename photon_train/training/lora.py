"""What is trained: LoRA adapters on the dense linears, and the new modules in full."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from photon_train.accounting.shape import Shape
from photon_train.config import LoraSettings, TrainSettings
from photon_train.errors import PhotonError
from photon_train.layouts import LAYOUTS
from photon_train.linears import EXPERTS, FUSED
from photon_train.models.experts_photon import HELD


def base_model(model: nn.Module) -> nn.Module:
    """The transformers model inside `model`, which may or may not carry adapters."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def new_module_names(model: nn.Module) -> list[str]:
    """Full names of the modules that no dense checkpoint had (none for a dense model)."""
    names = getattr(model, "new_module_names", None)
    return list(names()) if callable(names) else []


def inside(name: str, modules: list[str]) -> bool:
    """Whether `name` is one of the modules or lies in one."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def check_targets(settings: LoraSettings, dense: Any) -> None:
    """Check `lora.target_modules` against a dense configuration (an object or a dict), before anything is loaded.

    Raises:
        PhotonError: if one of them names no linear layer that a PHOTON model takes from a dense one, or a head that is
            the embedding.
    """
    if not settings.rank:
        return
    shape, targets = Shape.of(dense), settings.target_modules
    if targets is not None:
        experts = [EXPERTS] if shape.mixture else []
        _check_names(targets, {*shape.linear_names, *experts, "lm_head"}, "the model")
        _check_head(targets, shape.tied)
        _check_experts(settings)


def _check_names(targets: Collection[str], found: Collection[str], model: str) -> None:
    unknown = sorted(set(targets) - set(found))
    if unknown or not targets:
        raise PhotonError(
            f"lora.target_modules: {', '.join(unknown) or 'the empty list'} names no linear layer of {model}; it has "
            f"{', '.join(sorted(found))}"
        )


def _check_head(targets: Collection[str], tied: bool) -> None:
    """An adapter cannot be merged into one use of a weight that has two."""
    if tied and "lm_head" in targets:
        raise PhotonError(
            "lora.target_modules names lm_head, whose weight is the embedding's (tie_word_embeddings): leave it out, "
            "or untie the checkpoint first"
        )


def _check_experts(settings: LoraSettings) -> None:
    """The adapters of experts change their weights, not what goes through them: there is no input to drop."""
    if settings.dropout and EXPERTS in settings.target_modules:
        raise PhotonError(
            f"lora.dropout={settings.dropout} cannot be had on experts: set it to 0, or leave experts out of "
            "lora.target_modules"
        )


def _expert_parameters(model: nn.Module) -> list[str]:
    """Full names of the parameters that hold experts."""
    names = tuple(f".{name}" for name in HELD)
    return [name for name, _ in model.named_parameters() if name.endswith(names)]


def lora_targets(model: nn.Module, settings: LoraSettings) -> list[str]:
    """Full names of the linear layers that get an adapter: the named ones, or what they are stacked in, outside the
    new modules.

    Raises:
        PhotonError: if one of `lora.target_modules` names no linear layer of the model, or a head that is the
            embedding; for dropout on experts, which are parameters and not in the result.
    """
    new = new_module_names(model)
    linears = [
        name for name, module in model.named_modules() if isinstance(module, nn.Linear) and not inside(name, new)
    ]
    found = {name.rpartition(".")[2] for name in linears}
    # A dense model may hold linear layers stacked; its PHOTON model holds them apart.
    fused = {part: whole for whole, parts in FUSED.items() if whole in found for part in parts}
    if settings.target_modules is None:
        # Only the PHOTON models' families have a layout; any other dense model is taken for a Llama.
        layout = LAYOUTS.get(getattr(model.config, "base_model_type", model.config.model_type), LAYOUTS["llama"])
        wanted = {fused.get(target, target) for target in layout.linears} & found
    else:
        wanted = {fused.get(target, target) for target in settings.target_modules}
        experts = [EXPERTS] if _expert_parameters(model) else []
        _check_names(wanted, {*found, *experts}, type(model).__name__)
        _check_head(wanted, getattr(model.config, "tie_word_embeddings", False))
        _check_experts(settings)
    return [name for name in linears if name.rpartition(".")[2] in wanted]


def add_lora(model: PreTrainedModel, settings: LoraSettings, seed: int = 0) -> PeftModel | PreTrainedModel:
    """Freeze the dense weights, put LoRA (arXiv 2106.09685) on the named linears, keep new modules trainable.

    The function of the model is unchanged: LoRA's second factor starts at zero and the new modules are
    trained as copies.

    Args:
        model: Any causal LM of transformers; one with `new_module_names()` has these trained in full.
        settings: Rank 0 returns `model` itself with every weight trainable.
        seed: Seed of the adapters' first factor; the same on every process. The global generator is left as it was.

    Raises:
        PhotonError: for settings that fit no layer of the model.
    """
    if settings.rank == 0:
        return model.requires_grad_(True)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=lora_targets(model, settings),
        target_parameters=_expert_parameters(model) if EXPERTS in (settings.target_modules or ()) else None,
        modules_to_save=new_module_names(model) or None,
    )
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        return get_peft_model(model, config)


def merge_lora(model: PeftModel | PreTrainedModel) -> PreTrainedModel:
    """The transformers model with the adapters added into its weights and the trained new modules in place.

    `model` is used up. For a model that training has sharded or quantised, see `photon_train.training.collect`.

    Raises:
        PhotonError: for a model whose base is quantised: the sum would be rounded to its few bits again.
    """
    if getattr(base_model(model), "is_loaded_in_4bit", False):
        raise PhotonError("the base is in 4 bits: collect.gather_full_model adds the adapters to the stored weights")
    return model.merge_and_unload() if isinstance(model, PeftModel) else model


def parameter_groups(model: nn.Module, settings: TrainSettings) -> list[dict]:
    """AdamW groups of the trainable parameters: two learning rates, and weight decay on matrices only."""
    new = [f"{name}." for name in new_module_names(model)]
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_new = ".modules_to_save." in name or name.startswith(tuple(new))
            shape = getattr(parameter, "ds_shape", parameter.shape)  # a shard is flat
            groups.setdefault((is_new, len(shape) >= 2), []).append(parameter)
    if not groups:
        raise PhotonError("nothing to train: no parameter of the model requires a gradient")
    return [
        {
            "params": parameters,
            "lr": settings.new_modules_learning_rate if is_new else settings.learning_rate,
            "weight_decay": settings.weight_decay if is_matrix else 0.0,
        }
        for (is_new, is_matrix), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]
