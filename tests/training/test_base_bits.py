"""QLoRA on the CPU: what is rounded, what is trained, what is exported, and what is refused."""

from __future__ import annotations

import builtins
import json
import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import PeftModel
from pydantic import ValidationError
from tiny import base_config
from tiny_dense import dense_config
from tiny_training import losses, tiny_data, tiny_model, tiny_run
from torch import nn
from transformers import PreTrainedModel

from photon_train.config import DistillSettings, LoraSettings, RunConfig, TrainSettings
from photon_train.errors import PhotonError
from photon_train.training.accelerator import make_accelerator
from photon_train.training.base_bits import (
    StoredWeights,
    check_base_bits,
    check_machine,
    is_quantised,
    quantise_base,
)
from photon_train.training.collect import gather_full_model
from photon_train.training.loop import train
from photon_train.training.lora import add_lora, merge_lora

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("run_base_bits.py")
CONFIG = ROOT / "accelerate_configs" / "cpu_zero2.yaml"
LAUNCHERS = {
    "zero2": ["-m", "accelerate.commands.launch", "--main_process_port", "0", "--config_file", str(CONFIG)],
    "ddp": ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
}
TRAIN, EVAL = tiny_data(40), tiny_data(6, seed=1)
SETTINGS = TrainSettings(base_bits=4)
# Whole blocks of 64 weights; `down_proj` has none.
WIDE = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
needs_bitsandbytes = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes")


def wide(name: str) -> PreTrainedModel:
    return tiny_model(name, **({"base_config": base_config(**WIDE)} if name == "block-2" else WIDE))


def student(config: RunConfig, name: str = "memory", accelerator: Accelerator | None = None) -> PeftModel:
    model = quantise_base(wide(name), config.train, accelerator or Accelerator(cpu=True))
    return add_lora(model, config.lora, config.seed)


@pytest.fixture
def fresh_accelerator():
    """One process has one precision."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def dequantised(layer: nn.Module) -> torch.Tensor:
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(layer.weight.data, layer.weight.quant_state)


# --- what is rounded ---


@needs_bitsandbytes
@pytest.mark.parametrize("name", ["llama", "memory", "block-2"])
def test_linear_layers_of_the_dense_model_are_rounded_and_nothing_else(name):
    before, model = wide(name), quantise_base(wide(name), SETTINGS, Accelerator(cpu=True))
    new = tuple(getattr(model, "new_module_names", list)())
    rounded = {key for key, module in model.named_modules() if is_quantised(module)}
    linears = {key for key, module in before.named_modules() if isinstance(module, nn.Linear)}
    assert rounded == {key for key in linears if not key.endswith(("lm_head", "down_proj")) and not key.startswith(new)}
    assert rounded
    for key, module in before.named_modules():
        for kind, parameter in module.named_parameters(recurse=False):
            found = getattr(model.get_submodule(key), kind)
            if key in rounded and kind == "weight":
                assert found.dtype == torch.uint8 and not found.requires_grad
                error = dequantised(model.get_submodule(key)) - parameter
                assert 0.02 < (error.norm() / parameter.norm()).item() < 0.15  # of NormalFloat 4
            else:
                assert torch.equal(found, parameter)


@needs_bitsandbytes
@pytest.mark.parametrize("evaluated", [False, True])
def test_gradients_are_those_of_a_model_with_the_rounded_weights(evaluated):
    """After an evaluation too: some CPUs would then compute with packed weights that pass no gradient on."""
    model, plain = quantise_base(wide("memory"), SETTINGS, Accelerator(cpu=True)), wide("memory")
    with torch.no_grad():
        for key, module in model.named_modules():
            if is_quantised(module):
                plain.get_submodule(key).weight.copy_(dequantised(module))
    ids = EVAL.batch(torch.arange(2))["input_ids"]
    found = []
    for each in (model, plain):
        if evaluated:
            with torch.no_grad():
                each.eval()(input_ids=ids)
        each.train()
        logits = each(input_ids=ids, use_cache=False).logits
        logits.square().mean().backward()
        found.append((logits.detach(), each.get_input_embeddings().weight.grad))
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-4)
    assert found[0][1].abs().max() > 1e-4


# --- training ---


@needs_bitsandbytes
@pytest.mark.parametrize("name", ["llama", "memory", "block-2"])
def test_adapters_learn_over_a_rounded_base_that_stays(name, tmp_path):
    config = tiny_run(base_bits=4, max_steps=10)
    model = student(config, name)
    codes = {key: parameter.clone() for key, parameter in model.named_parameters() if parameter.dtype == torch.uint8}
    result = train(model, TRAIN, EVAL, config, tmp_path)
    assert result.metrics["eval/ce"] < result.initial_ce - 0.1
    after = dict(model.named_parameters())
    assert codes and all(torch.equal(after[key], value) for key, value in codes.items())


@needs_bitsandbytes
def test_bf16_computes_in_bf16_over_the_same_codes(tmp_path, fresh_accelerator):
    config = tiny_run(base_bits=4, mixed_precision="bf16", max_steps=10)
    accelerator = make_accelerator(config, tmp_path)
    model = student(config, accelerator=accelerator)
    computed = {module.compute_dtype for module in model.modules() if hasattr(module, "compute_dtype")}
    assert computed == {torch.bfloat16}
    result = train(model, TRAIN, EVAL, config, tmp_path, accelerator=accelerator)
    assert result.metrics["eval/ce"] < result.initial_ce - 0.1


@needs_bitsandbytes
def test_the_teacher_is_the_rounded_dense_model(tmp_path):
    config = replace(tiny_run(base_bits=4, max_steps=2), distill=DistillSettings(weight=1.0))
    result = train(student(config), TRAIN, EVAL, config, tmp_path)
    assert all(value > 0 for value in losses(result.history, "train/distill"))


@needs_bitsandbytes
def test_a_resumed_run_is_bit_identical_and_its_checkpoints_hold_no_codes(tmp_path):
    from safetensors import safe_open

    config = tiny_run(base_bits=4)
    straight = train(student(config), TRAIN, EVAL, config, tmp_path / "straight")

    def crash(step: int) -> None:
        if step == 5:
            raise RuntimeError("crash")

    with pytest.raises(RuntimeError, match="crash"):
        train(student(config), TRAIN, EVAL, config, tmp_path / "resumed", on_step=crash)
    config.resume = True
    resumed = train(student(config), TRAIN, EVAL, config, tmp_path / "resumed")
    for key in ("train/loss", "train/grad_norm", "eval/ce"):
        assert losses(resumed.history, key) == losses(straight.history, key), key
    with safe_open(straight.checkpoint / "model.safetensors", framework="pt") as file:
        assert all(".lora_" in name or ".modules_to_save." in name for name in file.keys())  # noqa: SIM118


@needs_bitsandbytes
def test_other_bits_are_another_run(tmp_path):
    config = tiny_run(base_bits=4, max_steps=3)
    train(student(config), TRAIN, EVAL, config, tmp_path)
    config = replace(tiny_run(max_steps=3), resume=True)
    with pytest.raises(PhotonError, match=r"train.base_bits \(checkpoint: 4, now: 16\)"):
        train(student(config), TRAIN, EVAL, config, tmp_path)


@needs_bitsandbytes
@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["zero2", "ddp"])
def test_two_processes_compute_what_one_computes(launcher, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support"), *sys.path])
    found = []
    for options, output, batch_size in ([], tmp_path / "one", 4), (LAUNCHERS[launcher], tmp_path / "two", 2):
        command = [sys.executable, *options, str(SCRIPT), str(output), str(batch_size)]
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stderr[-4000:]
        found.append(json.loads((output / "found.json").read_text()))
    assert [each["processes"] for each in found] == [1, 2]
    for key in ("train/loss", "train/grad_norm", "eval/ce", "exported"):
        assert found[1][key] == pytest.approx(found[0][key], rel=1e-4), key


# --- export ---


@needs_bitsandbytes
def test_adapters_are_added_to_the_weights_before_rounding(tmp_path):
    before = wide("memory")
    before.save_pretrained(tmp_path / "start")
    config = tiny_run({"target_modules": ["q_proj", "up_proj"]}, base_bits=4)
    result = train(student(config), TRAIN, EVAL, config, tmp_path)
    model = result.model.model
    state = gather_full_model(Accelerator(cpu=True), result.model, StoredWeights(tmp_path / "start"))
    assert state.keys() == before.state_dict().keys()
    deltas = {
        key.removeprefix("base_model.model."): module.get_delta_weight("default")
        for key, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }
    assert {key.rpartition(".")[2] for key in deltas} == {"q_proj", "up_proj"}
    new = tuple(before.new_module_names())
    for key, value in before.state_dict().items():
        if key.startswith(new):
            continue
        delta = deltas.get(key.removesuffix(".weight"), 0.0)
        torch.testing.assert_close(state[key], value + delta, atol=1e-7, rtol=0)
    assert any(float(delta.abs().max()) > 1e-3 for delta in deltas.values())


@needs_bitsandbytes
def test_rounded_weights_are_never_exported():
    config = tiny_run(base_bits=4)
    model = student(config)
    with pytest.raises(PhotonError, match="quantised.*give gather_full_model the weights"):
        gather_full_model(Accelerator(cpu=True), model)
    with pytest.raises(PhotonError, match="gather_full_model adds the adapters to the stored weights"):
        merge_lora(model)


@needs_bitsandbytes
def test_a_checkpoint_without_the_weight_is_named(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    with pytest.raises(PhotonError, match="lacks tensor model.layers.9.mlp.up_proj.weight"):
        StoredWeights(tmp_path)("model.layers.9.mlp.up_proj.weight")


# --- refusals ---


def test_full_fine_tuning_is_refused():
    with pytest.raises(ValidationError, match="train.base_bits=4 trains adapters.*lora.rank is 0"):
        RunConfig(train=TrainSettings(base_bits=4), lora=LoraSettings(rank=0))
    with pytest.raises(ValidationError, match="base_bits"):
        TrainSettings(base_bits=8)


def test_experts_are_counted_and_refused():
    dense = dense_config("qwen3_moe")
    with pytest.raises(PhotonError, match=r"would leave \d\d% of the model in full precision: its [\d,]+ parameters"):
        check_base_bits(SETTINGS, dense)
    check_base_bits(TrainSettings(), dense)
    check_base_bits(SETTINGS, dense_config("llama", hidden_size=64))


def test_a_model_without_whole_blocks_is_refused():
    with pytest.raises(PhotonError, match="no linear layer of the model has inputs in a multiple of 64"):
        check_base_bits(SETTINGS, dense_config("llama", hidden_size=32, intermediate_size=48))


def test_a_missing_package_is_named(monkeypatch):
    real = builtins.__import__

    def without(name, *arguments, **settings):
        if name.startswith("bitsandbytes"):
            raise ImportError(name)
        return real(name, *arguments, **settings)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(PhotonError, match="needs the package bitsandbytes: pip install bitsandbytes"):
        check_machine(SETTINGS, torch.device("cpu"), 0)
    check_machine(TrainSettings(), torch.device("cpu"), 0)


def test_divided_weights_are_refused():
    with pytest.raises(PhotonError, match="train.base_bits=4 with ZeRO-3.*zero2.yaml"):
        check_machine(SETTINGS, torch.device("cpu"), 3)


@needs_bitsandbytes
def test_a_backend_that_does_not_work_is_named(monkeypatch):
    import bitsandbytes

    check_machine(SETTINGS, torch.device("cpu"), 0)

    def fails(*_, **__):
        raise RuntimeError("no kernel for this device\nmany more lines")

    monkeypatch.setattr(bitsandbytes.functional, "quantize_4bit", fails)
    with pytest.raises(PhotonError, match=r"does not work on cpu \(no kernel for this device\): pip install"):
        check_machine(SETTINGS, torch.device("cpu"), 0)
