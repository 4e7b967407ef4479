"""Hybrids: recurrent layers of the family beside grafted attention, their states in one cache."""

from __future__ import annotations

import pytest
import torch
from peft.tuners.lora import LoraLayer
from tiny import photon_config, tokens
from tiny_dense import dense_config
from tiny_hybrid import HYBRIDS, hybrid_model
from transformers import AutoModelForCausalLM

from photon_train import accounting
from photon_train.config import LoraSettings
from photon_train.errors import PhotonError
from photon_train.layouts import LAYOUTS
from photon_train.training.lora import add_lora, check_targets

NEW = 12


@pytest.fixture(params=HYBRIDS)
def model(request):
    return hybrid_model(request.param)


def like(model, **changes):
    """Another model of the same family."""
    return hybrid_model(next(name for name in HYBRIDS if HYBRIDS[name][0] == model.config.base_model_type), **changes)


@torch.no_grad()
def naive_greedy(model, prompt: torch.Tensor) -> torch.Tensor:
    ids = prompt
    for _ in range(NEW):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    return ids


def generate(model, ids, **settings):
    model.generation_config.eos_token_id = None
    return model.generate(ids, **{"max_new_tokens": NEW, "do_sample": False, **settings})


def padded(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows ``[1, T]`` of several lengths as one batch that is padded on the left, and its mask."""
    longest = max(row.shape[1] for row in rows)
    ids, mask = torch.full((len(rows), longest), 2), torch.zeros(len(rows), longest, dtype=torch.long)
    for index, row in enumerate(rows):
        ids[index, -row.shape[1] :], mask[index, -row.shape[1] :] = row[0], 1
    return ids, mask


# --- decoding ---


def test_greedy_equals_the_full_forward(model):
    for length in (1, 2, 7, 25):
        prompt = tokens(2, length, seed=length)
        assert torch.equal(generate(model, prompt), naive_greedy(model, prompt))
    assert torch.equal(generate(model, prompt, prefill_chunk_size=6), naive_greedy(model, prompt))


def test_left_padded_batch_equals_each_prompt_alone(model):
    rows = [tokens(1, length, seed=length) for length in (1, 3, 12, 23)]
    ids, mask = padded(rows)
    out = generate(model, ids, attention_mask=mask)
    for index, row in enumerate(rows):
        assert torch.equal(out[index, 23:], naive_greedy(model, row)[0, row.shape[1] :])


@torch.no_grad()
def test_left_padding_is_what_the_dense_hybrid_makes_of_it(model):
    """In a whole pass and with a cache, while the window holds the text."""
    wide = like(model, window=64)
    dense = AutoModelForCausalLM.from_config(wide.config.dense_config()).eval()
    dense.load_state_dict(wide.state_dict(), strict=False)
    ids, mask = padded([tokens(1, 9), tokens(1, 20, seed=3)])
    step, longer = tokens(2, 1, seed=8), torch.cat([mask, mask[:, :1] * 0 + 1], dim=1)
    found, expected = (
        each(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0), use_cache=True)
        for each in (wide, dense)
    )
    torch.testing.assert_close(found.logits[mask.bool()], expected.logits[mask.bool()], atol=1e-4, rtol=0)
    place = mask.sum(1, keepdim=True)
    found, expected = (
        each(step, attention_mask=longer, position_ids=place, past_key_values=out.past_key_values).logits
        for each, out in ((wide, found), (dense, expected))
    )
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_beams_and_samples_take_their_states_along(model):
    prompt = tokens(2, 9)
    with_cache = generate(model, prompt, num_beams=3)
    assert torch.equal(with_cache, generate(model, prompt, num_beams=3, use_cache=False))
    sampled = generate(model, prompt[:1], num_return_sequences=2, do_sample=True, top_k=1)
    assert torch.equal(sampled, generate(model, prompt[:1]).repeat(2, 1))
    with torch.no_grad():
        cache = model(prompt, use_cache=True).past_key_values
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([3, 0]))
        found = model(tokens(2, 1), past_key_values=cache).logits[:, 0]
        text = torch.cat([prompt[[1, 0]], tokens(2, 1)], dim=1)
        torch.testing.assert_close(found, model(text, use_cache=False).logits[:, -1], atol=2e-4, rtol=0)


def test_going_on_from_a_cache_equals_generating_at_once(model):
    prompt, more = tokens(2, 9), tokens(2, 5, seed=4)
    out = generate(model, prompt, return_dict_in_generate=True)
    text = torch.cat([out.sequences, more], dim=1)
    assert torch.equal(generate(model, text, past_key_values=out.past_key_values), naive_greedy(model, text))


@pytest.mark.parametrize("length", [1, 3, 40])
@torch.no_grad()
def test_the_cache_has_the_bytes_that_are_estimated(model, length):
    cache = model(tokens(3, length), use_cache=True).past_key_values
    for step in range(4):
        found = accounting.cache_bytes(model.config, length + step, 4)
        assert cache.kv_bytes() == {"growing": 3 * found.growing, "constant": 3 * found.constant}
        model(tokens(3, 1), past_key_values=cache)
    states = accounting.Shape.of(model.config).state_bytes(4)
    assert 0 < states < found.constant
    # Half of a convolution's state in 16 bits, and all of a recurrent one.
    if model.config.base_model_type == "qwen3_5_text":
        assert accounting.Shape.of(model.config).state_bytes(2) > states / 2
    cache.reset()
    assert torch.equal(model(tokens(3, 5), past_key_values=cache).logits, model(tokens(3, 5), use_cache=True).logits)


@torch.no_grad()
def test_triton_decodes_what_torch_decodes():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name in ("convolutions", "delta-nets"):
        model, (ids, mask) = hybrid_model(name).to(device), padded([tokens(1, 4), tokens(1, 14, seed=1)])
        found = []
        for backend in ("torch", "triton"):
            model.set_backend(backend)
            cache = model(ids.to(device), attention_mask=mask.to(device), use_cache=True).past_key_values
            steps = [model(tokens(2, 1, seed).to(device), past_key_values=cache).logits for seed in range(5)]
            found.append(torch.cat(steps, dim=1))
        torch.testing.assert_close(*found, atol=2e-4, rtol=0)


# --- training ---


@pytest.mark.parametrize("as_dense", [False, True])
@torch.no_grad()
def test_hidden_states_of_packed_documents_are_their_own(model, as_dense):
    ids, lengths = tokens(1, 30), (17, 1, 12)
    position, settings = torch.cat([torch.arange(n) for n in lengths])[None], {"output_hidden_states": True}
    packed = model(ids, position_ids=position, as_dense=as_dense, use_cache=False, **settings).hidden_states
    parts = ids.split(lengths, dim=1)
    alone = [model(part, as_dense=as_dense, use_cache=False, **settings).hidden_states for part in parts]
    assert len(packed) == 5
    for layer, states in enumerate(packed):
        expected = torch.cat([each[layer] for each in alone], dim=1)
        torch.testing.assert_close(states, expected, atol=2e-4, rtol=0)


def test_adapters_go_on_every_linear_layer_or_on_those_that_are_named(model):
    family = model.config.base_model_type
    for targets in (None, [LAYOUTS[family].mixer.linears[-1], "k_proj"]):
        settings = LoraSettings(rank=3, target_modules=targets)
        check_targets(settings, model.config.dense_config())
        adapted = add_lora(like(model), settings)
        owners = {name.rpartition(".")[2] for name, module in adapted.named_modules() if isinstance(module, LoraLayer)}
        assert owners == set(targets or LAYOUTS[family].linears)
        trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
        assert trained == accounting.trainable_parameters(adapted.config, 3, targets)
    with pytest.raises(PhotonError, match="target_modules: conv names no linear layer"):
        check_targets(LoraSettings(target_modules=["conv"]), model.config.dense_config())


# --- what is refused ---


def test_states_are_not_taken_back(model):
    family = model.config.base_model_type
    match = f"this {family} model's recurrent layers cannot take tokens back: generate without an assistant"
    prompt = tokens(1, 9).repeat(1, 3)
    with pytest.raises(ValueError, match=match):
        generate(model, prompt, prompt_lookup_num_tokens=4)
    with pytest.raises(ValueError, match=match):
        generate(model, prompt, assistant_model=hybrid_model("convolutions"))
    with torch.no_grad():
        cache = model(prompt, use_cache=True).past_key_values
    with pytest.raises(ValueError, match=match):
        cache.crop(-1)
    assert not cache.is_croppable


@torch.no_grad()
def test_padding_that_states_would_read_is_refused(model):
    ids, match = tokens(2, 9), "recurrent layers.*padding_side='left'.*use_cache=False"
    hole = torch.ones_like(ids)
    hole[0, 4] = 0
    with pytest.raises(ValueError, match=match):
        model(ids, attention_mask=hole, use_cache=True)
    # Without a cache the rows are read without what lies between.
    found = model(ids, attention_mask=hole, use_cache=False).logits[0, 5:]
    kept = torch.cat([ids[:1, :4], ids[:1, 5:]], dim=1)
    torch.testing.assert_close(found, model(kept, use_cache=False).logits[0, 4:], atol=2e-4, rtol=0)
    cache = model(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match=match):
        model(ids[:, :3], attention_mask=torch.tensor([[0, 1, 1], [1, 1, 1]]), past_key_values=cache)


@torch.no_grad()
def test_a_convolution_with_a_bias_takes_rows_of_one_length():
    model, (ids, mask) = hybrid_model("convolutions", conv_bias=True), padded([tokens(1, 4), tokens(1, 9)])
    assert torch.equal(generate(model, tokens(2, 9)), naive_greedy(model, tokens(2, 9)))
    with pytest.raises(ValueError, match="conv_bias=True.*rows of one length, or use_cache=False"):
        model(ids, attention_mask=mask, use_cache=True)
    alone = model(tokens(1, 4), use_cache=False).logits[0]
    found = model(ids, attention_mask=mask, use_cache=False).logits[0, -4:]
    torch.testing.assert_close(found, alone, atol=2e-4, rtol=0)


@pytest.mark.parametrize("key", ["memory_cells", "full_attention_layers"])
def test_settings_of_layers_without_attention_are_refused(key):
    family, changes = HYBRIDS["convolutions-full"]
    named = {"memory_cells": {0: [0]}, "full_attention_layers": [2]}[key]
    kinds = dense_config(family).layer_types
    with pytest.raises(ValueError, match=f"{key} names layer .*which has no attention: drop it"):
        photon_config("memory", family, **{**changes, key: named, "num_hidden_layers": 4, "layer_types": kinds})
