"""What fine-tuning needs of the model: gradients everywhere, checkpointing, peft, saving, the auxiliary loss."""

from __future__ import annotations

import pytest
import torch
from accelerate import infer_auto_device_map
from peft import LoraConfig, get_peft_model
from tiny import HIERARCHIES, VOCABULARY, photon_config, photon_model, shake, tokens

from photon_train.models import PhotonForCausalLM

NAMES = sorted(HIERARCHIES)


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_has_a_gradient(name):
    model = photon_model(name).train()
    ids = tokens(2, 40)
    model(ids, labels=ids).loss.backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # The softmax over a window shifts nothing with a key bias; here every family is without one.
    assert not without


@pytest.mark.parametrize("name", ["memory-two-levels", "block-2", "slots-2-decoder", "residual-1-change"])
def test_gradient_checkpointing_changes_no_gradient(name):
    ids, gradients = tokens(2, 21), []
    for checkpointing in (False, True):
        model = photon_model(name).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(ids, labels=ids).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    for parameter, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][parameter], gradient, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["memory-two-levels", "block-2", "residual-2"])
def test_lora_trains_adapters_and_new_modules_and_merges_exactly(name):
    model, ids = photon_model(name), tokens(2, 21)
    new = model.new_module_names()
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], modules_to_save=new))
    trained = {n for n, p in adapted.named_parameters() if p.requires_grad}
    assert all(".lora_" in n or ".modules_to_save." in n for n in trained)
    assert any("chunker" in n for n in trained)
    shake(adapted, seed=3)
    adapted.train()
    adapted(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)
    adapted.eval()
    with torch.no_grad():
        expected = adapted(input_ids=ids).logits
        merged = adapted.merge_and_unload()
        torch.testing.assert_close(merged(ids).logits, expected, atol=1e-3, rtol=1e-4)
    assert {n for n, _ in merged.named_parameters()} == {n for n, _ in photon_model(name).named_parameters()}


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_saved_and_loaded_it_is_the_same_function(name, tmp_path):
    model, ids = photon_model(name, tie_word_embeddings=True), tokens(1, 17)
    model.save_pretrained(tmp_path)
    loaded, info = PhotonForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    ignored = {"_name_or_path"}
    assert {k: v for k, v in loaded.config.to_dict().items() if k not in ignored} == {
        k: v for k, v in model.config.to_dict().items() if k not in ignored
    }


def test_a_resized_vocabulary_survives_saving(tmp_path):
    model, ids = photon_model("memory-1"), tokens(2, 9)
    model.resize_token_embeddings(VOCABULARY + 3)
    model.save_pretrained(tmp_path)
    loaded = PhotonForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.config.vocab_size == VOCABULARY + 3
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize("name", ["memory-latent-shared", "memory-latent-apart"])
def test_weights_may_be_offloaded(name, tmp_path):
    model, ids = photon_model(name), tokens(2, 9)
    model.save_pretrained(tmp_path / "model")
    settings = {"device_map": {"model": "disk", "lm_head": "cpu"}, "offload_folder": tmp_path / "offloaded"}
    offloaded = PhotonForCausalLM.from_pretrained(tmp_path / "model", **settings).eval()
    assert offloaded.model.levels[0].encoder.layers[0].mlp.up_proj.weight.is_meta
    generate = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None}
    assert torch.equal(offloaded.generate(ids, **generate), model.generate(ids, **generate))


def test_a_device_map_does_not_divide_the_hierarchy():
    model = photon_model("memory-1")
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    memory = {0: int(0.7 * size), 1: 2 * size, "cpu": 2 * size}
    assert infer_auto_device_map(model, memory, no_split_module_classes=model._no_split_modules) == {"": 1}


def test_fresh_weights_are_the_documented_starting_values():
    model = PhotonForCausalLM(photon_config("block-2"))
    states = torch.randn(2, 3, 32)
    torch.testing.assert_close(model.model.levels[0].chunker(states), states.mean(1))
    slots = model.model.levels[0].converter(states)
    torch.testing.assert_close(slots, states[:, :, None].expand(-1, -1, 2, -1))
    assert model.model.start.state.abs().sum() == 0


def test_consistency_counts_levels_above_the_first_and_only_real_units():
    ids = tokens(2, 24)
    assert photon_model("block-1")(ids).consistency_loss is None
    model = photon_model("block-3")
    alone = model(ids[:1, :13]).consistency_loss
    assert 0 < alone < 2
    mask = torch.zeros(1, 24, dtype=torch.long)
    mask[:, :13] = 1
    torch.testing.assert_close(model(ids[:1], attention_mask=mask).consistency_loss, alone)


def test_consistency_enters_the_training_loss_with_its_weight():
    model, ids = photon_model("block-2", consistency_weight=0.5), tokens(2, 24)
    plain = model(ids, labels=ids).loss
    out = model.train()(ids, labels=ids)
    torch.testing.assert_close(out.loss, plain + 0.5 * out.consistency_loss)


def test_the_window_can_be_annealed():
    model, ids = photon_model("memory-1"), tokens(1, 30)
    with torch.no_grad():
        model.model.levels[0].decoder.input_scale.weight.fill_(1)
        wide, narrow = model(ids, window=64).logits, model(ids).logits
        torch.testing.assert_close(wide, model(ids, as_dense=True).logits, atol=1e-4, rtol=0)
    assert not torch.allclose(wide, narrow, atol=1e-2)


def test_the_dense_function_is_refused_where_it_is_not_there():
    with pytest.raises(ValueError, match="as_dense"):
        photon_model("block-1")(tokens(1, 5), as_dense=True)
