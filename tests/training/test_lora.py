"""Adapters: what is trained, that nothing changes at step 0, and that merging keeps the function."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from tiny import base_config, shake, tokens
from tiny_dense import dense_config
from tiny_training import PHOTON_MODELS, tiny_model
from transformers import AutoModelForCausalLM

from photon_train.config import LoraSettings, TrainSettings
from photon_train.errors import PhotonError
from photon_train.linears import LINEARS
from photon_train.training.collect import gather_full_model
from photon_train.training.lora import (
    add_lora,
    check_targets,
    lora_targets,
    merge_lora,
    new_module_names,
    parameter_groups,
)

MODELS = ("llama", *PHOTON_MODELS, "stream-2")
SETTINGS = LoraSettings(rank=4, alpha=8)


def _logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(tokens(2, 21)).logits


@pytest.mark.parametrize("name", MODELS)
def test_adapters_change_nothing_until_trained(name):
    model = tiny_model(name)
    before = _logits(model)
    assert torch.equal(_logits(add_lora(model, SETTINGS)), before)


@pytest.mark.parametrize("name", MODELS)
def test_only_adapters_and_new_modules_are_trained(name):
    model = tiny_model(name)
    new = new_module_names(model)
    new_weights = sum(p.numel() for module in new for p in model.get_submodule(module).parameters())
    assert bool(new) == (name != "llama")
    linears = sum(1 for key in dict(model.named_modules()) if key.rpartition(".")[2] in LINEARS)
    trained = {key: p for key, p in add_lora(model, SETTINGS).named_parameters() if p.requires_grad}
    assert sum(".lora_A." in key for key in trained) == sum(".lora_B." in key for key in trained) == linears
    assert sum(p.numel() for key, p in trained.items() if ".modules_to_save." in key) == new_weights
    assert all(".lora_" in key or ".modules_to_save." in key for key in trained)


def test_a_dense_model_with_stacked_layers_is_adapted_where_its_photon_model_is():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(dense_config("phi3"))
    stacked = {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}
    assert {name.rpartition(".")[2] for name in lora_targets(model, SETTINGS)} == stacked
    assert {n.rpartition(".")[2] for n in lora_targets(model, LoraSettings(target_modules=["k_proj"]))} == {"qkv_proj"}
    with pytest.raises(PhotonError, match="target_modules: kv_proj names no linear layer"):
        lora_targets(model, LoraSettings(target_modules=["kv_proj"]))


@pytest.mark.parametrize("name", MODELS)
def test_merging_and_gathering_keep_the_function(name):
    model = add_lora(tiny_model(name), SETTINGS)
    # Every trained value moves, the copies of the new modules included.
    frozen = {key: p.clone() for key, p in model.named_parameters() if not p.requires_grad}
    shake(model, seed=5)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key in frozen:
                parameter.copy_(frozen[key])
    expected = _logits(model)
    state = gather_full_model(Accelerator(cpu=True), model)
    fresh = tiny_model(name, seed=9)
    fresh.load_state_dict(state)
    assert (_logits(fresh) - expected).abs().max() < 1e-4
    merged = merge_lora(model)
    assert not isinstance(merged, PeftModel) and (_logits(merged) - expected).abs().max() < 1e-4
    assert state.keys() == merged.state_dict().keys()
    assert all(torch.equal(state[key], value) for key, value in merged.state_dict().items())


def test_tied_weights_are_gathered_once():
    model = add_lora(tiny_model("llama", tie_word_embeddings=True), SETTINGS)
    state = gather_full_model(Accelerator(cpu=True), model)
    assert state["lm_head.weight"] is state["model.embed_tokens.weight"]


def test_what_is_gathered_is_a_copy():
    model = tiny_model("llama")
    own = {parameter.data_ptr() for parameter in model.parameters()}
    assert not own & {tensor.data_ptr() for tensor in gather_full_model(Accelerator(), model).values()}


def test_adapters_are_scaled_by_alpha_over_rank():
    model = add_lora(tiny_model("llama"), LoraSettings(rank=4, alpha=12))
    assert {module.scaling["default"] for module in model.modules() if isinstance(module, LoraLayer)} == {3.0}


def test_a_layer_whose_name_begins_like_a_new_module_is_no_part_of_it():
    model = torch.nn.ModuleDict(
        {name: torch.nn.ModuleDict({"q_proj": torch.nn.Linear(2, 2)}) for name in ("memory_1", "memory_10")}
    )
    model.config, model.new_module_names = SimpleNamespace(), lambda: ["memory_1"]
    assert lora_targets(model, LoraSettings(target_modules=["q_proj"])) == ["memory_10.q_proj"]


def test_the_adapters_depend_on_the_seed_alone():
    models = [tiny_model("llama") for _ in range(3)]
    before = torch.get_rng_state()
    states = [add_lora(model, SETTINGS, seed).state_dict() for model, seed in zip(models, (1, 1, 2), strict=True)]
    assert torch.equal(torch.get_rng_state(), before)
    key = next(key for key in states[0] if ".lora_A." in key)
    assert torch.equal(states[0][key], states[1][key]) and not torch.equal(states[0][key], states[2][key])


def test_rank_zero_trains_every_weight():
    model = tiny_model("block-2")
    assert add_lora(model, LoraSettings(rank=0)) is model
    assert merge_lora(model) is model
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("rank", [0, 4])
def test_groups_give_each_parameter_its_rate_and_decay(rank):
    model = tiny_model("memory")
    new = tuple(f"{name}." for name in new_module_names(model))
    model = add_lora(model, LoraSettings(rank=rank))
    settings = TrainSettings(learning_rate=1.0, new_modules_learning_rate=2.0, weight_decay=0.5)
    groups = parameter_groups(model, settings)
    given = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(given) == sum(len(group["params"]) for group in groups) == len(trained)
    for name, parameter in trained.items():
        is_new = name.removeprefix("base_model.model.").startswith(new)
        assert given[id(parameter)] == (2.0 if is_new else 1.0, 0.5 if parameter.dim() >= 2 else 0.0), name


@pytest.mark.parametrize(
    "settings, named",
    [
        (LoraSettings(target_modules=["q_proj", "qkv_proj"]), "qkv_proj names no linear layer"),
        (LoraSettings(target_modules=[]), "lora.target_modules"),
        (LoraSettings(target_modules=["key_proj"]), "key_proj"),
    ],
)
def test_settings_that_fit_no_layer_are_named(settings, named):
    with pytest.raises(PhotonError, match=named):
        add_lora(tiny_model("memory"), settings)


def test_an_adapter_on_a_tied_head_is_refused():
    """Merged, it would have to change the embedding as well; the export would leave it out."""
    settings = LoraSettings(target_modules=["q_proj", "lm_head"])
    with pytest.raises(PhotonError, match="lm_head, whose weight is the embedding's"):
        add_lora(tiny_model("llama", tie_word_embeddings=True), settings)
    with pytest.raises(PhotonError, match="lm_head, whose weight is the embedding's"):
        check_targets(settings, base_config(tie_word_embeddings=True))
    add_lora(tiny_model("llama"), settings)
    check_targets(settings, base_config())


def test_targets_are_checked_before_anything_is_loaded():
    with pytest.raises(PhotonError, match="q_porj names no linear layer of the model; it has .*q_proj"):
        check_targets(LoraSettings(target_modules=["q_porj"]), base_config())
    check_targets(LoraSettings(rank=0, target_modules=[]), base_config())
