"""What fine-tuning needs of the hierarchical model: gradients everywhere, checkpointing, peft, saving."""

from __future__ import annotations

import pytest
import torch
from accelerate import infer_auto_device_map
from peft import LoraConfig, get_peft_model
from tiny import VOCABULARY, shake, tokens
from tiny_hierarchical import HIERARCHIES, hierarchical_config, hierarchical_model

from photon_train.models import HierarchicalForCausalLM

NAMES = sorted(HIERARCHIES)


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_has_a_gradient(name):
    model = hierarchical_model(name).train()
    ids = tokens(2, 40)
    model(ids, labels=ids).loss.backward()
    without = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0}
    # A group of one child predicts it from its slots alone: its decoder reads no child.
    alone = [index for index, level in enumerate(model.config.levels) if level["chunk_size"] == 1]
    assert without == {f"model.levels.{index}.decoder.input_scale.weight" for index in alone}


@pytest.mark.parametrize("name", ["block-3", "stream-3"])
@pytest.mark.parametrize("length", [1, 2])
def test_short_texts_give_every_parameter_a_gradient_if_only_zero(name, length):
    """Data-parallel training waits for the gradient of every parameter."""
    model, ids = hierarchical_model(name).train(), tokens(2, length)
    model(ids).logits.sum().backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None]
    assert all(p.grad.isfinite().all() for p in model.parameters())
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(ids).logits, model.train()(ids).logits)


@pytest.mark.parametrize("name", ["block-2", "stream-2-slots"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(name, reentrant):
    ids, gradients = tokens(2, 21), []
    for checkpointing in (False, True):
        model = hierarchical_model(name).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(ids, labels=ids).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    for parameter, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][parameter], gradient, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="cannot fill a cache"):
        model(ids, past_key_values=model.new_cache())


@pytest.mark.parametrize("name", ["block-2", "stream-2-slots"])
def test_gradients_are_those_of_the_function(name):
    """Against differences along a random direction, for the parameters of every kind of module."""
    model, ids, generator = hierarchical_model(name).double(), tokens(1, 13), torch.Generator().manual_seed(1)
    weights = torch.randn(1, 13, VOCABULARY, generator=generator, dtype=torch.float64)

    def loss():
        return (model(ids, use_cache=False).logits * weights).sum() / 13

    loss().backward()
    for kind in ("chunker", "converter", "start", "input_scale", "encoder.layers", "decoder.layers", "embed_tokens"):
        moved = [p for n, p in model.named_parameters() if kind in n]
        directions = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in moved]
        directions = [direction / sum(p.numel() for p in moved) ** 0.5 for direction in directions]
        slope = sum(float((p.grad * d).sum()) for p, d in zip(moved, directions, strict=True))
        losses = []
        with torch.no_grad():
            for step in (1e-3, -2e-3):
                for p, d in zip(moved, directions, strict=True):
                    p += step * d
                losses.append(float(loss()))
            for p, d in zip(moved, directions, strict=True):
                p += 1e-3 * d
        assert (losses[0] - losses[1]) / 2e-3 == pytest.approx(slope, rel=1e-3, abs=1e-3), kind


@pytest.mark.parametrize("name", ["block-2", "stream-2-slots"])
@torch.no_grad()
def test_windows_as_one_fused_kernel_are_the_same_windows(name):
    model, ids = hierarchical_model(name), tokens(2, 40)
    expected = model(ids, use_cache=False).logits
    model.set_fused_windows("yes")
    torch.testing.assert_close(model(ids, use_cache=False).logits, expected, atol=2e-4, rtol=0)


@pytest.mark.parametrize("name", ["block-2", "stream-2-slots"])
def test_lora_trains_adapters_and_new_modules_and_merges_exactly(name):
    model, ids = hierarchical_model(name), tokens(2, 21)
    new = model.new_module_names()
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], modules_to_save=new))
    trained = {n for n, p in adapted.named_parameters() if p.requires_grad}
    assert all(".lora_" in n or ".modules_to_save." in n for n in trained)
    for kind in ("chunker", "converter", "start.", "input_scale"):
        assert any(kind in n for n in trained)
    shake(adapted, seed=3)
    adapted.train()
    adapted(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)
    adapted.eval()
    with torch.no_grad():
        expected = adapted(input_ids=ids).logits
        merged = adapted.merge_and_unload()
        torch.testing.assert_close(merged(ids).logits, expected, atol=1e-3, rtol=1e-4)
    assert {n for n, _ in merged.named_parameters()} == {n for n, _ in hierarchical_model(name).named_parameters()}


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_saved_and_loaded_it_is_the_same_function(name, tmp_path):
    model, ids = hierarchical_model(name, tie_word_embeddings=True), tokens(1, 17)
    model.save_pretrained(tmp_path)
    loaded, info = HierarchicalForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    kept, expected = (
        {key: value for key, value in each.config.to_dict().items() if key != "_name_or_path"}
        for each in (loaded, model)
    )
    assert kept == expected


def test_weights_have_the_documented_names():
    names = {name.replace(".0.", ".N.") for name, _ in hierarchical_model("block-1").named_parameters()}
    stack = {"self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj", "input_layernorm"}
    expected = {f"model.levels.N.{side}.layers.N.{part}.weight" for side in ("encoder", "decoder") for part in stack}
    expected |= {f"model.levels.N.{part}.{of}" for part in ("chunker", "converter") for of in ("proj.weight", "scale")}
    expected |= {"model.levels.N.decoder.input_scale.weight", "model.start.state", "model.norm.weight"}
    assert expected | {"model.embed_tokens.weight", "lm_head.weight"} <= names


def test_a_resized_vocabulary_survives_saving(tmp_path):
    model, ids = hierarchical_model("stream-1"), tokens(2, 9)
    model.resize_token_embeddings(VOCABULARY + 3)
    model.save_pretrained(tmp_path)
    loaded = HierarchicalForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.config.vocab_size == VOCABULARY + 3
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)


def test_weights_may_be_offloaded(tmp_path):
    model, ids = hierarchical_model("stream-2-slots"), tokens(2, 9)
    model.save_pretrained(tmp_path / "model")
    settings = {"device_map": {"model": "disk", "lm_head": "cpu"}, "offload_folder": tmp_path / "offloaded"}
    offloaded = HierarchicalForCausalLM.from_pretrained(tmp_path / "model", **settings).eval()
    assert offloaded.model.levels[0].encoder.layers[0].mlp.up_proj.weight.is_meta
    generate = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None}
    assert torch.equal(offloaded.generate(ids, **generate), model.generate(ids, **generate))


def test_a_device_map_does_not_divide_the_hierarchy():
    model = hierarchical_model("block-1")
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    memory = {0: int(0.7 * size), 1: 2 * size, "cpu": 2 * size}
    assert infer_auto_device_map(model, memory, no_split_module_classes=model._no_split_modules) == {"": 1}


def test_fresh_weights_are_the_documented_starting_values():
    model = HierarchicalForCausalLM(hierarchical_config("block-2"))
    states = torch.randn(2, 3, 32)
    torch.testing.assert_close(model.model.levels[0].chunker(states), states.mean(1))
    slots = model.model.levels[0].converter(states)
    torch.testing.assert_close(slots, states[:, :, None].expand(-1, -1, 2, -1))
    assert model.model.start.state.abs().sum() == 0
    torch.testing.assert_close(model.model.levels[1].decoder.input_scale(states), states)


def test_consistency_counts_levels_above_the_first_and_only_real_units():
    ids = tokens(2, 24)
    assert hierarchical_model("block-1")(ids).consistency_loss is None
    model = hierarchical_model("block-3")
    alone = model(ids[:1, :13]).consistency_loss
    assert 0 < alone < 2
    mask = torch.zeros(1, 24, dtype=torch.long)
    mask[:, :13] = 1
    torch.testing.assert_close(model(ids[:1], attention_mask=mask).consistency_loss, alone)
    assert model(ids, past_key_values=model(ids).past_key_values).consistency_loss is None


def test_consistency_enters_the_training_loss_with_its_weight():
    model, ids = hierarchical_model("block-2", consistency_weight=0.5), tokens(2, 24)
    plain = model(ids, labels=ids).loss
    out = model.train()(ids, labels=ids)
    torch.testing.assert_close(out.loss, plain + 0.5 * out.consistency_loss)


def test_states_keep_the_type_of_the_weights():
    """New modules trained in fp32 beside bf16 layers do not make the whole depth fp32."""
    model = hierarchical_model("stream-2-slots").bfloat16()
    for name in model.new_module_names():
        model.get_submodule(name).float()
    seen = set()
    for stack in (model.model.levels[0].encoder, model.model.levels[0].decoder):
        stack.layers[0].register_forward_pre_hook(lambda module, inputs: seen.add(inputs[0].dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(tokens(1, 13)).logits.isfinite().all()
    assert seen == {torch.bfloat16}
