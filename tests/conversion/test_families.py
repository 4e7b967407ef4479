"""What the registry says of a family is what transformers builds."""

from __future__ import annotations

import pytest
import torch
from tiny_dense import FAMILY_NAMES, dense_config
from transformers import AutoModelForCausalLM, GPT2Config

from photon_train.conversion.families import FAMILIES, attention_span, dense_tensors, family_of
from photon_train.errors import PhotonError
from photon_train.models.families_photon import CLASS_PREFIXES


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        *((name, {}) for name in FAMILY_NAMES),
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("qwen3", {"attention_bias": True}),
    ],
)
def test_expected_tensors_are_those_of_transformers(model_type, changes):
    config = dense_config(model_type, **changes)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    real = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del real["lm_head.weight"]
    assert dense_tensors(config) == real


def test_the_registries_of_conversion_and_model_name_the_same_families():
    assert set(FAMILIES) == set(CLASS_PREFIXES) == set(FAMILY_NAMES)


def test_an_unsupported_family_lists_the_supported_ones():
    with pytest.raises(PhotonError, match="'gpt2'.*llama, mistral, qwen2, qwen3"):
        family_of(GPT2Config())


@pytest.mark.parametrize(
    ("model_type", "changes", "span"),
    [
        ("llama", {}, None),
        ("mistral", {"sliding_window": 32}, 32),
        ("mistral", {"sliding_window": None}, None),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 32}, None),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 2}, 32),
    ],
)
def test_sliding_windows_are_recognised(model_type, changes, span):
    assert attention_span(dense_config(model_type, **changes)) == span
