"""Every mode of transformers' `generate()` on PHOTON: with a window that holds the text, what the dense family writes;
with a short one and a memory, what the model writes without a cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import VOCABULARY, base_config, shake
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.generation import GenerateBeamDecoderOnlyOutput, GenerateDecoderOnlyOutput

from photon_train.models import PhotonConfig, PhotonForCausalLM

LENGTH, NEW = 21, 14
OUTPUTS = {"return_dict_in_generate": True, "output_scores": True}
MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "processors": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "bad_words_ids": [[7], [9, 11]]},
    "stops": {"eos_token_id": list(range(3, 20)), "min_new_tokens": 4},
    "guidance": {"guidance_scale": 1.7},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 30, "top_p": 0.9, "num_return_sequences": 3},
    "beams": {"num_beams": 4, "length_penalty": 1.4, "num_return_sequences": 2},
    "beam sampling": {"num_beams": 3, "do_sample": True, "top_k": 20},
    "prefill in chunks": {"prefill_chunk_size": 9},  # more than the padding of a prompt: see REFUSED
}
# Drafts that are checked several at a time: only with a cache, and what greedy decoding writes.
DRAFTS = ("prompt lookup", "assistant")


def _model(window: int) -> PhotonForCausalLM:
    settings = base_config()
    photon = {"window": window, "num_sinks": 1, "chunk_size": 2, "memory_cells": {1: [0], 2: [0, 1]}}
    return shake(
        PhotonForCausalLM(PhotonConfig(base_model_type=settings.pop("model_type"), **photon, **settings))
    ).eval()


@pytest.fixture(scope="module")
def wide() -> PhotonForCausalLM:
    return _model(LENGTH + NEW + 2)


@pytest.fixture(scope="module")
def narrow() -> PhotonForCausalLM:
    return _model(6)


@pytest.fixture(scope="module")
def dense(wide: PhotonForCausalLM) -> PreTrainedModel:
    """The dense model that `wide` computes."""
    model = AutoModelForCausalLM.from_config(wide.config.dense_config())
    extra = model.load_state_dict(wide.state_dict(), strict=False)
    assert not extra.missing_keys and all(".memory." in name for name in extra.unexpected_keys)
    return model.eval()


def _inputs(kind: str) -> dict[str, torch.Tensor]:
    """Two prompts: of one length, or the second shorter, with padding before it."""
    ids = torch.randint(3, VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if kind == "padded":
        ids[1, :8], mask[1, :8] = 2, 0
    return {"input_ids": ids, "attention_mask": mask}


def _generate(
    model: PreTrainedModel, inputs: dict[str, torch.Tensor], **settings: Any
) -> GenerateDecoderOnlyOutput | GenerateBeamDecoderOnlyOutput:
    torch.manual_seed(5)
    defaults = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 2, **OUTPUTS}
    return model.generate(**inputs, **{**defaults, **settings})


def _equal(found: Any, expected: Any, names: tuple[str, ...] = ("scores",)) -> None:
    assert found.sequences.tolist() == expected.sequences.tolist()
    for name in names:
        for one, other in zip(getattr(found, name), getattr(expected, name), strict=True):
            torch.testing.assert_close(one, other, atol=2e-4, rtol=0)


@pytest.mark.parametrize("kind", ["even", "padded"])
@pytest.mark.parametrize("mode", MODES)
def test_the_dense_familys_text(wide: PhotonForCausalLM, dense: PreTrainedModel, mode: str, kind: str) -> None:
    inputs = _inputs(kind)
    _equal(_generate(wide, inputs, **MODES[mode]), _generate(dense, inputs, **MODES[mode]))


@pytest.mark.parametrize("kind", ["even", "padded"])
@pytest.mark.parametrize("mode", MODES)
def test_the_text_without_a_cache(narrow: PhotonForCausalLM, mode: str, kind: str) -> None:
    inputs = _inputs(kind)
    expected = _generate(narrow, inputs, **{**MODES[mode], "use_cache": False, "prefill_chunk_size": None})
    _equal(_generate(narrow, inputs, **MODES[mode]), expected)


@pytest.mark.parametrize("drafts", DRAFTS)
@pytest.mark.parametrize("window", ["wide", "narrow"])
def test_drafts(request: pytest.FixtureRequest, dense: PreTrainedModel, window: str, drafts: str) -> None:
    model = request.getfixturevalue(window)
    ids = _inputs("even")["input_ids"][:1].repeat(1, 3)[:, : LENGTH + 10]  # with something to look up
    settings = {"assistant_model": dense} if drafts == "assistant" else {"prompt_lookup_num_tokens": 4}
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    settings |= {"return_dict_in_generate": False, "output_scores": False}
    found = _generate(model, inputs, **settings)
    assert found.tolist() == _generate(model, inputs, use_cache=False).sequences.tolist()


def test_hidden_states(wide: PhotonForCausalLM, dense: PreTrainedModel) -> None:
    settings = {"output_hidden_states": True, "output_logits": True, "max_new_tokens": 4}
    found, expected = (_generate(model, _inputs("padded"), **settings) for model in (wide, dense))
    _equal(found, expected, ("scores", "logits"))
    real = _inputs("padded")["attention_mask"].bool()
    for step, (ours, theirs) in enumerate(zip(found.hidden_states, expected.hidden_states, strict=True)):
        for one, other in zip(ours, theirs, strict=True):
            rows = real if step == 0 else slice(None)
            torch.testing.assert_close(one[rows], other[rows], atol=2e-4, rtol=0)


@pytest.mark.parametrize("window", ["wide", "narrow"])
def test_embeddings_in_place_of_tokens(request: pytest.FixtureRequest, window: str) -> None:
    model, inputs = request.getfixturevalue(window), _inputs("padded")
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    found = _generate(model, {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]})
    expected = _generate(model, inputs)
    assert found.sequences.tolist() == expected.sequences[:, LENGTH:].tolist()


@pytest.mark.parametrize("window", ["wide", "narrow"])
def test_going_on_from_a_cache(request: pytest.FixtureRequest, window: str) -> None:
    """A second call with the first one's cache writes what one call writes."""
    model, inputs = request.getfixturevalue(window), _inputs("padded")
    expected = _generate(model, inputs)
    first = _generate(model, inputs, max_new_tokens=5)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 5), value=1)
    rest = {"input_ids": first.sequences, "attention_mask": mask, "past_key_values": first.past_key_values}
    assert _generate(model, rest, max_new_tokens=NEW - 5).sequences.tolist() == expected.sequences.tolist()


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a cache of transformers": ({"cache_implementation": "static"}, "cache_implementation"),
    "attention weights": ({"output_attentions": True}, "output_attentions"),
    "a chunk without a token": ({"prefill_chunk_size": 5}, "attention_mask has no token in row 1"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refusals(wide: PhotonForCausalLM, what: str) -> None:
    settings, message = REFUSED[what]
    with pytest.raises(ValueError, match=message):
        _generate(wide, _inputs("padded"), **settings)
