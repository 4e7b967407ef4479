"""The graft's configuration: what it chooses, and settings that it cannot serve."""

from __future__ import annotations

import pytest
from tiny_dense import dense_config

from photon_train.config import PRESETS as NAMES
from photon_train.config import ConsistencySettings, LevelOverrides, PhotonSettings, RunConfig, TrainSettings
from photon_train.conversion.graft import memory_candidates
from photon_train.conversion.presets import PRESETS, photon_config, target_of
from photon_train.errors import PhotonError

QWEN = {"use_sliding_window": True, "sliding_window": 32, "num_hidden_layers": 8}


def run(seq_len: int = 64, consistency: float = 0.0, **photon) -> RunConfig:
    return RunConfig(
        photon=PhotonSettings(**photon),
        train=TrainSettings(seq_len=seq_len),
        consistency=ConsistencySettings(weight=consistency),
    )


def eight_layers():
    return dense_config(num_hidden_layers=8)


def test_every_preset_of_the_settings_has_a_kind_of_model():
    assert tuple(PRESETS) == NAMES
    assert target_of(photon_config(eight_layers(), run())) is PRESETS["graft"]


def test_defaults():
    config = photon_config(eight_layers(), run())
    assert (config.window, config.num_sinks, config.chunk_size) == (64, 4, 4)
    assert (config.memory_layers, config.latents_per_unit, config.full_attention_layers) == ([7], 1, [])


@pytest.mark.parametrize(
    ("total", "layers", "chunk_size"),
    [(1, [0], 8), (4, [3], 8), (16, [11, 15], 4), (22, [16, 21], 4), (32, [19, 23, 27, 31], 4)],
)
def test_the_default_memory_takes_at_most_a_thirtieth_of_the_dense_cache(total, layers, chunk_size):
    config = photon_config(dense_config(num_hidden_layers=total), run())
    assert (config.memory_layers, config.chunk_size) == (layers, chunk_size)
    assert len(layers) / (total * chunk_size) <= 0.032 or total < 4


@pytest.mark.parametrize(("kv_heads", "chosen", "parts"), [(16, None, 1), (32, None, 2), (32, 1, 1), (16, 2, 2)])
def test_wide_latents_are_packed_in_two_parts(kv_heads, chosen, parts):
    dense = dense_config(num_attention_heads=32, num_key_value_heads=kv_heads, head_dim=128, num_hidden_layers=8)
    assert photon_config(dense, run(latents_per_unit=chosen)).latents_per_unit == parts


def test_the_window_is_wider_for_real_models():
    assert photon_config(dense_config(hidden_size=1024), run()).window == 256


def test_the_default_window_reaches_over_a_unit():
    assert photon_config(eight_layers(), run(seq_len=512, chunk_size=128)).window == 128


def test_overrides_reach_the_configuration():
    settings = run(chunk_size=6, window=50, num_sinks=0, memory_layers=[5, 2], full_attention_layers=[0])
    config = photon_config(eight_layers(), settings)
    assert (config.chunk_size, config.window, config.num_sinks) == (6, 50, 0)
    assert (config.memory_layers, config.full_attention_layers) == ([2, 5], [0])


def test_sequences_need_not_be_whole_units():
    assert photon_config(eight_layers(), run(seq_len=67)).chunk_size == 4


@pytest.mark.parametrize(
    ("dense", "photon", "layers"),
    [
        (eight_layers(), {"full_attention_layers": [7, 6]}, [5]),
        (eight_layers(), {"full_attention_layers": [7, 6], "num_memory_layers": 6}, [0, 1, 2, 3, 4, 5]),
        # Layers 0-3 are global, 4-7 keep the family's own window.
        (dense_config("qwen2", **QWEN, max_window_layers=4), {}, [3]),
        (dense_config("qwen2", **QWEN, max_window_layers=4), {"num_memory_layers": 2}, [2, 3]),
    ],
)
def test_chosen_layers_are_those_that_can_have_a_memory(dense, photon, layers):
    settings = run(**photon)
    assert photon_config(dense, settings).memory_layers == layers
    assert set(layers) <= set(memory_candidates(dense, settings.photon))


def test_the_dense_architecture_is_kept_in_full():
    rope = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    dense = dense_config("llama", rope_parameters=rope, attention_bias=True, rms_norm_eps=1e-3)
    config = photon_config(dense, run())
    for each in (config, config.dense_config()):
        for key in ("rope_parameters", "attention_bias", "rms_norm_eps", "num_key_value_heads", "tie_word_embeddings"):
            assert getattr(each, key) == getattr(dense, key)


BAD = {
    "a window below the unit": (run(window=3), "photon.window=3 is shorter than photon.chunk_size=4"),
    "a memory layer outside": (run(memory_layers=[1, 8]), "photon.memory_layers names layer 8.*0...7"),
    "units without memory": (
        run(memory_layers=[], chunk_size=4),
        "photon.chunk_size.*memory_layers is empty: drop one",
    ),
    "latents without memory": (
        run(memory_layers=[], latents_per_unit=2),
        "photon.latents_per_unit.*is empty: drop one",
    ),
    "memory and full attention": (
        run(memory_layers=[1], full_attention_layers=[1]),
        r"layers \[1\] are in photon.memory_layers and in photon.full_attention_layers: keep one",
    ),
    "a full layer outside": (run(full_attention_layers=[9]), "photon.full_attention_layers names layer 9"),
    "more layers than can have memory": (
        run(full_attention_layers=[0, 1], num_memory_layers=7),
        "photon.num_memory_layers=7: 6 layers can have memory",
    ),
    "levels": (run(levels=[LevelOverrides(chunk_size=4)]), "photon.levels is for presets split and paper.*drop it"),
    "a number of levels": (run(num_levels=1), "photon.num_levels is for presets split and paper.*drop it"),
    "consistency": (run(consistency=0.1), "consistency.weight=0.1.*preset graft"),
}


@pytest.mark.parametrize("name", BAD)
def test_settings_that_cannot_be_served_name_their_key(name):
    settings, message = BAD[name]
    with pytest.raises(PhotonError, match=message) as error:
        photon_config(eight_layers(), settings)
    assert "\n" not in str(error.value)


def test_a_window_beyond_the_dense_models_own():
    with pytest.raises(PhotonError, match="photon.window=64 exceeds the dense model's sliding_window=32"):
        photon_config(dense_config("mistral", sliding_window=32), run())


def test_what_the_dense_configuration_has_wrong_is_named_there():
    with pytest.raises(PhotonError, match="^config.json: attention_dropout=0.1 is not supported"):
        photon_config(dense_config(attention_dropout=0.1), run())
