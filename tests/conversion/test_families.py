"""What the registry says of a family is what transformers builds."""

from __future__ import annotations

import pytest
import torch
import write_families
from tiny_dense import FAMILY_NAMES, dense_config
from transformers import AutoModelForCausalLM, GPT2Config
from transformers.core_model_loading import revert_weight_conversion

from photon_train.accounting import Shape
from photon_train.config import RunConfig
from photon_train.conversion.families import FAMILIES, dense_tensors, family_of, layer_config, stored_as
from photon_train.conversion.presets import photon_config
from photon_train.errors import PhotonError
from photon_train.layouts import LAYOUTS
from photon_train.models import PhotonForCausalLM
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
    stored = revert_weight_conversion(model, model.state_dict())  # as `save_pretrained` names them
    real = {name: tuple(tensor.shape) for name, tensor in stored.items()}
    if config.tie_word_embeddings:
        del real["lm_head.weight"]
    assert dense_tensors(config) == real


def test_the_registries_of_conversion_and_model_name_the_same_families():
    assert set(FAMILIES) == set(FAMILY_NAMES)
    assert {family.layers or name for name, family in FAMILIES.items()} == set(CLASS_PREFIXES)


def test_the_page_of_families_is_what_the_registries_say():
    assert write_families.PAGE.read_text(encoding="utf-8") == write_families.page(), "run tools/write_families.py"


def test_every_family_has_a_layout():
    assert set(LAYOUTS) == set(FAMILIES)


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("qwen3_next", "shared expert"),
        ("qwen3_5_moe_text", "shared expert"),
        ("qwen3_5", "images.*the language model alone"),
        ("lfm2_moe", "two kinds of MLP"),
        ("granitemoehybrid", "Mamba-2"),
        ("nemotron_h", "Mamba-2"),
        ("kimi_linear", "latent attention"),
        ("deepseek_v2", "multi-head latent attention"),
        ("deepseek_v3", "multi-head latent attention"),
        ("minicpm3", "multi-head latent attention"),
        ("hunyuan_v1_dense", "after their rotation"),
        ("gemma3", "images"),
        ("olmo", "nearest supported one is olmo"),
        ("granite_swa", "nearest supported one is granite:"),
        ("unheard_of", "entry in the registries"),
        (None, "entry in the registries"),
    ],
)
def test_an_unsupported_family_is_told_why_or_the_nearest(model_type, message):
    with pytest.raises(PhotonError, match=message) as error:
        family_of({"model_type": model_type})
    assert "\n" not in str(error.value) and "supported families: cohere2, " in str(error.value)


def test_what_a_family_does_that_is_not_served_is_refused_by_name():
    with pytest.raises(PhotonError, match="use_bidirectional_attention"):
        layer_config(dense_config("gemma3_text", use_bidirectional_attention=True), 64)
    rope = {"full_attention": _rope("dynamic", factor=2.0), "sliding_attention": _rope("default")}
    with pytest.raises(PhotonError, match="rope_type dynamic or longrope for one kind"):
        layer_config(dense_config("gemma3_text", rope_parameters=rope), 64)
    with pytest.raises(PhotonError, match="preset split .*use preset graft for family olmo2"):
        photon_config(dense_config("olmo2"), RunConfig(preset="split"))
    assert layer_config(dense_config("seed_oss", attention_dropout=0.1), 64)["attention_dropout"] == 0


def test_backends_that_cannot_bound_scores_are_refused_by_name():
    model = PhotonForCausalLM(photon_config(dense_config("gemma2"), RunConfig()))
    with pytest.raises(ValueError, match="backend 'triton'.*gemma2.*attn_logit_softcapping=1.5: use backend 'torch'"):
        model.set_backend("triton")
    with pytest.raises(ValueError, match="flex_attention.*attn_logit_softcapping=1.5: use fused='auto'"):
        model.set_fused_windows("yes")
    model.set_backend("torch")
    model.set_fused_windows("auto")
    sinks = PhotonForCausalLM(photon_config(dense_config("gpt_oss"), RunConfig()))
    with pytest.raises(ValueError, match="flex_attention.*no sink logits.*gpt_oss.*use fused='auto'"):
        sinks.set_fused_windows("yes")
    free = PhotonForCausalLM(photon_config(dense_config("gemma2", attn_logit_softcapping=None), RunConfig()))
    free.set_fused_windows("yes")


def test_an_unsupported_family_lists_the_supported_ones():
    with pytest.raises(PhotonError, match="'gpt2'.*llama, .*mistral, .*qwen3"):
        family_of(GPT2Config())


@pytest.mark.parametrize(
    ("model_type", "changes", "windows"),
    [
        ("llama", {}, (None,) * 4),
        ("lfm2", {}, (0, None, 0, None)),
        ("qwen3_5_text", {}, (0, None, 0, None)),
        ("mistral", {"sliding_window": 32}, (32,) * 4),
        ("mistral", {"sliding_window": None}, (None,) * 4),
        ("phi3", {"sliding_window": 32}, (32,) * 4),
        ("phi3", {"sliding_window": None}, (None,) * 4),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 32}, (None,) * 4),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 2}, (None, None, 32, 32)),
    ],
)
def test_sliding_windows_are_recognised(model_type, changes, windows):
    config = dense_config(model_type, **changes)
    assert Shape.of(config).windows == Shape.of(config.to_dict()).windows == windows


def test_where_a_stacked_layer_lies():
    config = dense_config("phi3")
    stored = {name: stored_as(config, f"model.layers.3.{name}.weight") for name in ("self_attn.k_proj", "mlp.up_proj")}
    assert stored["self_attn.k_proj"] == ("model.layers.3.self_attn.qkv_proj.weight", 32)
    assert stored["mlp.up_proj"] == ("model.layers.3.mlp.gate_up_proj.weight", 48)
    for name in ("model.layers.3.mlp.down_proj.weight", "model.layers.3.input_layernorm.weight"):
        assert stored_as(config, name) == (name, None)
    name = "model.layers.3.self_attn.k_proj.weight"
    assert stored_as(dense_config(), name) == (name, None)


def test_a_window_that_is_switched_off_stays_off_in_the_layers():
    """Mistral's own default is 4,096."""
    assert layer_config(dense_config("phi3", sliding_window=None), 64)["sliding_window"] is None
    assert layer_config(dense_config("phi3", sliding_window=32), 64)["sliding_window"] == 32


def test_layers_are_described_by_the_architecture_alone():
    config = dense_config(architectures=["LlamaForCausalLM"], dtype="bfloat16")
    config.auto_map = {"AutoConfig": "theirs.Config"}
    settings = layer_config(config, 64)
    assert not settings.keys() & {"architectures", "auto_map", "dtype", "torch_dtype", "transformers_version"}
    assert settings["model_type"] == "llama" and settings["hidden_size"] == config.hidden_size


def _rope(kind: str, **more):
    return {"rope_type": kind, "rope_theta": 1e4, **more}


def test_rotations_that_a_cache_cannot_follow_are_refused_or_fixed():
    long = _rope("longrope", short_factor=[1.0] * 4, long_factor=[4.0] * 4, original_max_position_embeddings=64)
    config = dense_config("phi3", rope_parameters=long, original_max_position_embeddings=64)
    for seq_len, factor in ((64, 1.0), (65, 4.0)):
        rope = layer_config(config, seq_len)["rope_parameters"]
        assert rope["short_factor"] == rope["long_factor"] == [factor] * 4
    with pytest.raises(PhotonError, match="rope_type=dynamic"):
        layer_config(dense_config(rope_parameters=_rope("dynamic", factor=2.0)), 64)
    with pytest.raises(PhotonError, match="partial_rotary_factor=0.5"):
        layer_config(dense_config("phi3", rope_parameters=_rope("default", partial_rotary_factor=0.5)), 64)
