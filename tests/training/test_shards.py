"""What processes without weights hold of a model until they get their shards (which test_deepspeed.py starts)."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM, GenerationConfig

from photon_train.config import LoraSettings
from photon_train.training.lora import add_lora
from photon_train.training.shards import empty_model


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
