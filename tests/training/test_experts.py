"""Families with experts: adapters on attention and on experts, two steps, merged, exported and loaded again."""

from __future__ import annotations

import json

import pytest
import torch
from accelerate import Accelerator
from safetensors import safe_open
from tiny import shake, tokens
from tiny_dense import dense_config, save_dense
from tiny_tokenizer import word_tokenizer
from tiny_training import losses, tiny_data, tiny_run
from transformers import AutoModelForCausalLM

from photon_train import accounting
from photon_train.config import ExportSettings, LoraSettings, RunConfig
from photon_train.conversion.families import dense_tensors, layer_config
from photon_train.conversion.presets import photon_config
from photon_train.conversion.source import DenseCheckpoint
from photon_train.errors import PhotonError
from photon_train.export.save import export_model
from photon_train.linears import ATTENTION
from photon_train.models import PhotonForCausalLM
from photon_train.models.experts_photon import EXPERTS, HELD
from photon_train.training.collect import gather_full_model
from photon_train.training.loop import train
from photon_train.training.lora import add_lora, check_targets, merge_lora

FAMILIES = tuple(EXPERTS)
ALL = ["q_proj", "experts"]


def model_of(family: str, **changes) -> PhotonForCausalLM:
    return shake(PhotonForCausalLM(photon_config(dense_config(family, **changes), RunConfig()))).eval()


def stored_names(directory) -> set[str]:
    names: set[str] = set()
    for path in directory.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            names |= set(file.keys())
    return names


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(tokens(2, 21), use_cache=False).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_two_steps_are_merged_exported_and_loaded_under_the_checkpoints_names(family, tmp_path):
    before = model_of(family)
    model = add_lora(model_of(family), LoraSettings(rank=2, alpha=8, target_modules=ALL))
    adapted = {name for name, each in model.named_parameters() if each.requires_grad and "experts" in name}
    assert len(adapted) == 2 * 2 * 4  # two factors of two parameters in four layers
    result = train(model, tiny_data(8), tiny_data(5, seed=1), tiny_run(max_steps=2, warmup_steps=0), tmp_path / "run")
    assert len(losses(result.history)) == 2
    state = gather_full_model(Accelerator(cpu=True), result.model)
    trained = logits(model)
    merged = merge_lora(model)
    held = [name for name in state if name.endswith(HELD)]
    assert len(held) == 8 and state.keys() == merged.state_dict().keys()
    for name in held:  # every expert that a token went to
        assert (state[name] - before.get_parameter(name)).abs().amax() > 1e-4, name
        torch.testing.assert_close(state[name], merged.get_parameter(name), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(logits(merged), trained, atol=1e-4, rtol=0)
    directory = export_model(
        before, word_tokenizer(), tmp_path / "export", settings=ExportSettings(), card="", state_dict=state
    )
    memory = {name for name in merged.state_dict() if ".memory." in name}
    assert stored_names(directory) == set(dense_tensors(dense_config(family))) | memory
    loaded, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(info.values()), info
    torch.testing.assert_close(logits(loaded), trained, atol=1e-4, rtol=0)
    loaded.save_pretrained(tmp_path / "again")
    assert stored_names(tmp_path / "again") == stored_names(directory)


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_are_counted_and_lie_on_attention_by_default(family):
    for targets, trained in ((None, set(ATTENTION)), (ALL, {"q_proj", "experts"})):
        settings = LoraSettings(rank=3, target_modules=targets)
        check_targets(settings, dense_config(family))
        model = add_lora(model_of(family), settings)
        config, parameters = model.config, dict(model.named_parameters())
        count = sum(each.numel() for each in parameters.values() if each.requires_grad)
        assert accounting.trainable_parameters(config, 3, targets) == count
        adapted = [name.partition(".lora_A.")[0].split(".") for name in parameters if ".lora_A." in name]
        owners = {next(part for part in parts if part in (*ATTENTION, "experts")) for parts in adapted}
        assert owners == trained
        total = accounting.photon_parameters(config)
        inner = config.to_dict().get("moe_intermediate_size", 48)
        expert, idle = 3 * 32 * inner + (2 * inner + 32) * (family == "gpt_oss"), 5 - 2  # whose experts have biases
        assert total == model.num_parameters() - count  # new modules are there a second time, frozen
        assert accounting.active_parameters(config, total) == total - 4 * expert * idle


def test_targets_that_models_with_experts_have_not_are_named():
    dense = dense_config("mixtral")
    with pytest.raises(PhotonError, match="gate_proj names no linear layer of the model; it has experts, k_proj"):
        check_targets(LoraSettings(target_modules=["gate_proj"]), dense)
    with pytest.raises(PhotonError, match="experts names no linear layer"):
        check_targets(LoraSettings(target_modules=["experts"]), dense_config("llama"))
    dropout = LoraSettings(target_modules=["experts"], dropout=0.1)
    with pytest.raises(PhotonError, match="lora.dropout=0.1 cannot be had on experts"):
        check_targets(dropout, dense)
    with pytest.raises(PhotonError, match="lora.dropout=0.1 cannot be had on experts"):
        add_lora(model_of("mixtral"), dropout)


def test_what_experts_are_not_served_with_is_refused(tmp_path):
    with pytest.raises(PhotonError, match=r"mlp_only_layers=\[1\]"):
        layer_config(dense_config("qwen3_moe", mlp_only_layers=[1]), 64)
    with pytest.raises(PhotonError, match="decoder_sparse_step=2"):
        layer_config(dense_config("qwen3_moe", decoder_sparse_step=2), 64)
    assert layer_config(dense_config("mixtral", output_router_logits=True), 64)["output_router_logits"] is False
    with pytest.raises(ValueError, match="output_router_logits"):
        model_of("mixtral")(tokens(1, 5), output_router_logits=True)
    directory = save_dense(tmp_path / "dense", "mixtral")
    path = directory / "config.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "num_local_experts": 6}))
    with pytest.raises(PhotonError, match=r"lacks tensor model.layers.0.block_sparse_moe.experts.5.w1.weight"):
        DenseCheckpoint.open(str(directory))


def test_flops_count_the_experts_of_a_token_alone():
    dense = dense_config("qwen3_moe", num_hidden_layers=1)
    attention, router, expert = 32 * 32 * 2 + 32 * 16 * 2, 5 * 32, 3 * 24 * 32
    weights = attention + router + 2 * expert + 64 * 32
    assert accounting.dense_flops(dense, 0) == 2 * weights
    assert accounting.estimate(dense, photon_config(dense, RunConfig()), accounting.TrainingSetup(64)).dense_active == (
        accounting.dense_parameters(dense) - 3 * expert
    )
