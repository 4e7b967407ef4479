"""What fine-tuning and loading need of the model: gradients everywhere, checkpointing, peft, saving, types."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from accelerate import infer_auto_device_map
from peft import LoraConfig, get_peft_model
from tiny import GRAFTS, VOCABULARY, photon_config, photon_model, shake, tokens
from transformers import AutoModel, AutoModelForCausalLM, LlamaForCausalLM, LlamaModel

from photon_train.models import PhotonForCausalLM, PhotonModel

NAMES = sorted(GRAFTS)


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_has_a_gradient(name):
    model = photon_model(name).train()
    ids = tokens(2, 40)
    model(ids, labels=ids).loss.backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # The memory of one unit per token sees no packing; a softmax over one token has no use for queries and keys.
    assert not [n for n in without if name != "window-one-token" or ".q_proj" not in n and ".k_proj" not in n]


def test_in_a_window_that_holds_the_text_the_memory_has_gradients_of_zero():
    """Every process of a distributed training then has the same parameters to reduce."""
    model, ids = photon_model("memory", window=64).train(), tokens(2, 20)
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None and not p.grad.any() for n, p in model.named_parameters() if ".memory." in n)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["memory", "memory-4-bits", "memory-full"])
def test_gradient_checkpointing_changes_no_gradient(name, reentrant):
    ids, gradients = tokens(2, 21), []
    for checkpointing in (False, True):
        model = photon_model(name).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(ids, labels=ids).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    for parameter, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][parameter], gradient, atol=1e-5, rtol=1e-4)


def test_checkpointing_does_not_fill_a_cache():
    model, ids = photon_model("memory").train(), tokens(2, 21)
    model.gradient_checkpointing_enable()
    assert model(ids, use_cache=True).past_key_values is None
    with pytest.raises(ValueError, match="gradient checkpointing computes layers twice"):
        model(ids, past_key_values=model.new_cache())


@pytest.mark.parametrize("name", ["memory", "memory-4-bits", "memory-full"])
@pytest.mark.parametrize("length", [31, 40])
def test_gradients_pass_through_a_cache_within_a_pass(name, length):
    """A loss on the second of two segments has the gradients of what that segment computes."""
    model, ids = photon_model(name).train(), tokens(1, length)
    with torch.no_grad():
        cache = model(ids[:, :30], use_cache=True).past_key_values
    embeds = model.get_input_embeddings()(ids[:, 30:]).detach().requires_grad_()
    model(inputs_embeds=embeds, past_key_values=cache).logits.pow(2).sum().backward()
    whole = model.get_input_embeddings()(ids).detach()
    last = whole[:, 30:].clone().requires_grad_()
    model(inputs_embeds=torch.cat([whole[:, :30], last], dim=1)).logits[:, 30:].pow(2).sum().backward()
    torch.testing.assert_close(embeds.grad, last.grad, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", ["memory", "memory-apart"])
def test_lora_trains_adapters_and_new_modules_and_merges_exactly(name):
    model, ids = photon_model(name), tokens(2, 21)
    new = model.new_module_names()
    assert new == [f"model.layers.{layer}.self_attn.memory" for layer in (0, 2)]
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


@torch.no_grad()
def test_the_base_model_is_a_base_model_of_transformers(tmp_path):
    model, ids = photon_model("memory"), tokens(2, 19)
    assert isinstance(model, LlamaForCausalLM) and isinstance(model.base_model, LlamaModel)
    assert isinstance(model.base_model, PhotonModel) and model.config.use_cache
    mask = torch.ones_like(ids)
    out = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False, output_hidden_states=True)
    torch.testing.assert_close(model.lm_head(out.last_hidden_state), model(ids).logits)
    assert out.past_key_values is None and len(out.hidden_states) == 4
    assert torch.equal(out.hidden_states[0], model.get_input_embeddings()(ids))
    # Padded, hidden states stand where their tokens stand.
    padded, wide = torch.full((2, 23), 2), torch.zeros(2, 23, dtype=torch.long)
    padded[:, 4:], wide[:, 4:] = ids, 1
    found = model(padded, attention_mask=wide, output_hidden_states=True).hidden_states
    for mine, theirs in zip(found, out.hidden_states, strict=True):
        torch.testing.assert_close(mine[:, 4:], theirs)
    cached = model.base_model(inputs_embeds=model.get_input_embeddings()(ids[:, :11]), use_cache=True)
    again = model.base_model(ids[:, 11:], past_key_values=cached.past_key_values)
    torch.testing.assert_close(again.last_hidden_state, out.last_hidden_state[:, 11:])
    model.save_pretrained(tmp_path)
    base = AutoModel.from_pretrained(tmp_path).eval()
    assert isinstance(base, PhotonModel)
    assert torch.equal(base(ids).last_hidden_state, out.last_hidden_state)


def test_what_a_base_model_cannot_give_is_refused_in_one_line():
    model, ids = photon_model("memory"), tokens(2, 9)
    for call, message in (
        (lambda: model(ids, output_attentions=True), "PHOTON never holds attention weights"),
        (lambda: model(ids[:, :0]), r"the input has no tokens \(batch 2, length 0\)"),
        (lambda: model(ids[:0]), r"the input has no tokens \(batch 0, length 9\)"),
        (lambda: model(ids, attention_mask=torch.zeros_like(ids)), "attention_mask has no token in row 0"),
        (lambda: model(ids, attention_mask=torch.ones(2, 1, 9, 9)), r"2-D attention_mask .* not \[2, 1, 9, 9\]"),
        (lambda: model(ids, position_ids=torch.arange(9)[None] // 2), "position_ids must count the tokens of each row"),
        (lambda: model(ids, position_ids=torch.arange(9)), r"PHOTON takes 2-D position_ids .* not \[9\]"),
        (lambda: model(), "input_ids or inputs_embeds|exactly one of"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            call()
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="leave attn_implementation='eager' out"):
        AutoModelForCausalLM.from_config(photon_config("memory"), attn_implementation="eager")


@torch.no_grad()
def test_position_ids_may_be_given_as_every_row_counts_them():
    model, ids = photon_model("memory"), tokens(2, 9)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1], [1] * 9])
    counted = (mask.cumsum(1) - 1).clamp(min=0)
    expected = model(ids, attention_mask=mask).logits
    for given in (counted, torch.arange(9)[None], torch.arange(5, 14)[None]):
        assert torch.equal(model(ids, attention_mask=mask, position_ids=given).logits, expected)


def test_half_precision_keeps_the_dense_models_residual_stream():
    """bf16 weights give a bf16 residual stream, as in the dense model, under autocast and without."""
    model, ids = photon_model("memory").to(torch.bfloat16), tokens(2, 19)
    out = model(ids, output_hidden_states=True, use_cache=True)
    assert {states.dtype for states in out.hidden_states} == {torch.bfloat16}
    assert out.past_key_values.window.keys[0].dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        states = photon_model("memory")(ids, output_hidden_states=True).hidden_states
        dense = LlamaForCausalLM(photon_config("memory").dense_config())(ids, output_hidden_states=True).hidden_states
    assert [s.dtype for s in states] == [s.dtype for s in dense]


@pytest.mark.parametrize("name", ["memory", "memory-full"])
@torch.no_grad()
def test_under_autocast_a_cache_has_the_type_of_the_computation(name):
    model, ids = photon_model(name), tokens(2, 24)
    expected = model(ids, use_cache=False).logits[:, -1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cache = model(ids[:, :20], use_cache=True).past_key_values
        model(ids[:, 20:23], past_key_values=cache)
        found = model(ids[:, 23:], past_key_values=cache).logits[:, -1]
    stored = [states for ring in cache.rings() for states in (*ring.keys.values(), *ring.values.values())]
    stored += [states for store in cache.growing() for states in store.tensors()]
    assert {states.dtype for states in stored} == {torch.bfloat16}
    assert (found - expected).norm() < 0.05 * expected.norm()


def test_a_resized_vocabulary_survives_saving(tmp_path):
    model, ids = photon_model("memory"), tokens(2, 9)
    model.resize_token_embeddings(VOCABULARY + 3)
    model.save_pretrained(tmp_path)
    loaded = PhotonForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.config.vocab_size == VOCABULARY + 3
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)


def test_copies_and_pickles_are_the_same_model():
    model, ids = photon_model("memory"), tokens(1, 17)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(again) is type(model) and again.config.to_dict() == model.config.to_dict()
        assert torch.equal(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize("name", ["memory", "memory-apart"])
def test_weights_may_be_offloaded(name, tmp_path):
    model, ids = photon_model(name), tokens(2, 9)
    model.save_pretrained(tmp_path / "model")
    settings = {"device_map": {"model": "disk", "lm_head": "cpu"}, "offload_folder": tmp_path / "offloaded"}
    offloaded = PhotonForCausalLM.from_pretrained(tmp_path / "model", **settings).eval()
    assert offloaded.model.layers[0].mlp.up_proj.weight.is_meta
    generate = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None}
    assert torch.equal(offloaded.generate(ids, **generate), model.generate(ids, **generate))


def test_a_device_map_does_not_divide_a_layer():
    model = photon_model("memory")
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    memory = {0: int(0.7 * size), 1: 2 * size, "cpu": 2 * size}
    placed = infer_auto_device_map(model, memory, no_split_module_classes=model._no_split_modules)
    assert set(placed.values()) == {0, 1}
    assert not [name for name in placed if ".layers." in name and name.count(".") > 2]


def test_fresh_weights_are_the_documented_starting_values():
    memory = PhotonForCausalLM(photon_config("memory")).model.layers[2].self_attn.memory
    keys, values = torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 8)
    packed, stored = memory.pack(keys, values)
    assert stored is packed
    torch.testing.assert_close(packed[0], keys.unflatten(2, (3, 3)).mean(3))
    torch.testing.assert_close(memory.unpack(*packed)[1], values.unflatten(2, (3, 3)).mean(3).repeat_interleave(3, 2))
