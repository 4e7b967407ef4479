"""What processes without weights hold of a model until they get their shards (which test_deepspeed.py starts)."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM, GenerationConfig

from photon_train.config import LoraSettings
from photon_train.errors import PhotonError
from photon_train.pipeline.base import TrainingRun
from photon_train.training import shards
from photon_train.training.lora import add_lora
from photon_train.training.shards import empty_model, shard


@pytest.mark.parametrize(("name", "tied"), [("memory", False), ("memory", True), ("block-2", False)])
def test_an_empty_model_is_the_checkpoints_without_its_weights(name, tied, tmp_path):
    tiny_model(name, tie_word_embeddings=tied).to(torch.bfloat16).save_pretrained(tmp_path)
    GenerationConfig(temperature=0.25, do_sample=True).save_pretrained(tmp_path)
    whole, empty = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto"), empty_model(tmp_path)
    assert not empty.training and empty.generation_config.temperature == 0.25
    assert (empty.get_output_embeddings().weight is empty.get_input_embeddings().weight) == tied
    assert dict(empty.named_buffers()).keys() == dict(whole.named_buffers()).keys()
    for name, buffer in empty.named_buffers():
        assert torch.equal(buffer, whole.get_buffer(name)), name
    settings = LoraSettings(rank=2, target_modules=["q_proj"])
    empty, whole = add_lora(empty, settings), add_lora(whole, settings)
    parameters = [
        [(name, p.shape, p.dtype, p.requires_grad) for name, p in model.named_parameters()] for model in (empty, whole)
    ]
    assert parameters[0] == parameters[1]
    assert all(parameter.is_meta for name, parameter in empty.named_parameters() if ".lora_" not in name)


@pytest.fixture
def divided(monkeypatch):
    """Names of the parameters that DeepSpeed would divide, in order; without DeepSpeed and other processes."""
    found = []

    def begin(_, parameter):
        found.append(parameter)
        parameter.convert_to_zero_parameters = lambda param_list: found.extend(param_list)

    monkeypatch.setattr(shards, "_begin", begin)
    monkeypatch.setattr(shards, "broadcast_object_list", lambda objects: objects)
    return found


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_every_parameter_is_divided_once_and_tied_ones_stay_tied(precision, divided, tmp_path):
    tiny_model("memory", tie_word_embeddings=True).save_pretrained(tmp_path)
    model = empty_model(tmp_path)
    names = dict(model.named_parameters()).keys()
    shard(SimpleNamespace(mixed_precision=precision, device=torch.device("cpu")), model)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert dict(model.named_parameters()).keys() == names
    assert list(map(id, divided)) == list(map(id, model.parameters()))
    expected = torch.bfloat16 if precision == "bf16" else torch.float32
    assert all(parameter.device.type == "cpu" and parameter.dtype == expected for parameter in divided)


def test_what_the_main_process_holds_decides(divided, monkeypatch, tmp_path):
    tiny_model("memory").save_pretrained(tmp_path)
    model, accelerator = empty_model(tmp_path), SimpleNamespace(mixed_precision="no", device=torch.device("cpu"))
    main = [(name, tuple(each.shape), torch.bfloat16) for name, each in model.named_parameters()]
    monkeypatch.setattr(shards, "broadcast_object_list", lambda objects: [main])
    shard(accelerator, model)
    assert {parameter.dtype for parameter in divided} == {torch.bfloat16}
    main.pop()
    with pytest.raises(PhotonError, match="different models: do all machines see the same files"):
        shard(accelerator, model)


@pytest.mark.parametrize("is_main", [True, False])
@pytest.mark.parametrize("stage", [2, 3])
def test_a_run_loads_the_weights_where_they_are_needed(is_main, stage, tmp_path):
    tiny_model("memory").save_pretrained(tmp_path)
    plugin = SimpleNamespace(zero_stage=stage)
    accelerator = SimpleNamespace(
        deepspeed_plugin=plugin, is_main_process=is_main, main_process_first=nullcontext, device=torch.device("cpu")
    )
    run = TrainingRun(SimpleNamespace(output=tmp_path), accelerator, None)
    for is_trained in (True, False):
        weights = list(run.load(tmp_path, is_trained=is_trained).parameters())
        assert all(each.is_meta == (is_trained and stage == 3 and not is_main) for each in weights)
