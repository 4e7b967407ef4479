"""The graft's configuration: what it chooses, and settings that it cannot serve."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_dense import dense_config

from photon_train import accounting
from photon_train.config import PRESETS as NAMES
from photon_train.config import ConsistencySettings, LevelOverrides, PhotonSettings, RunConfig, TrainSettings
from photon_train.conversion.graft import count_cells, format_cells, memory_candidates, parse_cells
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


def smollm2():
    """The shape of SmolLM2-135M."""
    shape = {"hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3}
    return dense_config(**shape, head_dim=64)


def test_defaults():
    config = photon_config(eight_layers(), run())
    assert (config.window, config.num_sinks, config.chunk_size, config.memory_bits) == (64, 4, 2, 4)
    assert (config.memory_cells, config.latents_per_unit, config.full_attention_layers) == ({7: [1]}, 1, [])


def test_the_default_budget_is_a_hundredth_of_what_grows():
    config, whole = photon_config(smollm2(), run()), 30 * 3 * 2 * 64 * 2
    # For two tokens a cell stores two halves of 64 numbers in 4 bits, with a scale of two bytes each.
    assert accounting.growing_bytes_per_token(config) == 6 * 2 * (32 + 2) / 2 <= 0.01 * whole < 7 * 2 * (32 + 2) / 2


@settings(max_examples=60, deadline=None)
@given(
    budget=st.floats(1.2, 100),
    bits=st.sampled_from([16, 8, 4]),
    chunk_size=st.integers(1, 8),
    full=st.lists(st.integers(0, 29), max_size=3, unique=True),
)
def test_a_budget_is_spent_as_far_as_whole_cells_go(budget, bits, chunk_size, full):
    dense = smollm2()
    chosen = run(memory_budget=budget, memory_bits=bits, chunk_size=chunk_size, full_attention_layers=full)
    config, whole = photon_config(dense, chosen), accounting.dense_cache_bytes(dense, 1)
    cells = sum(map(len, config.memory_cells.values()))
    assert cells == count_cells(dense, chosen.photon)
    memory = accounting.growing_bytes_per_token(config) - len(full) * whole / 30
    assert memory <= budget / 100 * whole * (1 + 1e-9)
    assert cells == 3 * (30 - len(full)) or memory * (cells + 1) / cells > budget / 100 * whole
    assert not set(full) & set(config.memory_cells)


def test_a_budget_counts_in_percent_and_a_whole_cell_is_not_lost_to_rounding():
    """One of 90 cells, unpacked and in 16 bits, is a ninetieth; all are all."""
    for cells in (1, 7, 29, 90):
        chosen = run(memory_budget=cells / 90 * 100, memory_bits=16, chunk_size=1)
        assert sum(map(len, photon_config(smollm2(), chosen).memory_cells.values())) == cells


@pytest.mark.parametrize(
    ("count", "cells"),
    [
        (1, {29: [2]}),
        (4, {18: [2], 22: [1], 26: [0], 29: [2]}),
        (45, {layer: [0, 1, 2] for layer in range(15, 30)}),
        (90, {layer: [0, 1, 2] for layer in range(30)}),
    ],
)
def test_unprobed_cells_are_spread_over_the_upper_half(count, cells):
    chosen = run(memory_budget=count / 90 * 100, memory_bits=16, chunk_size=1)
    assert photon_config(smollm2(), chosen).memory_cells == cells


@pytest.mark.parametrize("total", [1, 4])
def test_a_model_too_small_for_the_default_budget_has_one_cell(total):
    config = photon_config(dense_config(num_hidden_layers=total), run())
    assert config.memory_cells == {total - 1: [1]}


def test_cells_as_text_and_by_layer():
    text = ["18:0", "7:2", "7:0", "10:1"]
    assert parse_cells(text) == {7: [0, 2], 10: [1], 18: [0]}
    assert format_cells(parse_cells(text)) == ["7:0", "7:2", "10:1", "18:0"]
    assert parse_cells([]) == {} and format_cells({}) == []


@pytest.mark.parametrize(("heads", "chosen", "parts"), [(16, None, 1), (17, None, 2), (32, 1, 1), (16, 2, 2)])
def test_wide_latents_are_packed_in_two_parts(heads, chosen, parts):
    dense = dense_config(num_attention_heads=32, num_key_value_heads=32, head_dim=128, num_hidden_layers=8)
    # The widest layer decides.
    cells = ["1:0", *(f"5:{head}" for head in range(heads))]
    assert photon_config(dense, run(memory_cells=cells, latents_per_unit=chosen)).latents_per_unit == parts


def test_the_window_is_wider_for_real_models():
    assert photon_config(dense_config(hidden_size=1024), run()).window == 512


def test_the_default_window_reaches_over_a_unit():
    assert photon_config(eight_layers(), run(seq_len=512, chunk_size=128)).window == 128


def test_overrides_reach_the_configuration():
    chosen = run(
        chunk_size=6, window=50, num_sinks=0, memory_cells=["5:1", "2:0"], memory_bits=8, full_attention_layers=[0]
    )
    config = photon_config(eight_layers(), chosen)
    assert (config.chunk_size, config.window, config.num_sinks, config.memory_bits) == (6, 50, 0, 8)
    assert (config.memory_cells, config.full_attention_layers) == ({2: [0], 5: [1]}, [0])


def test_sequences_need_not_be_whole_units():
    assert photon_config(eight_layers(), run(seq_len=67)).chunk_size == 2


@pytest.mark.parametrize(
    ("dense", "photon", "layers"),
    [
        (eight_layers(), {"full_attention_layers": [7, 6]}, [5]),
        (eight_layers(), {"full_attention_layers": [7, 6], "memory_budget": 99}, [0, 1, 2, 3, 4, 5]),
        # Layers 0-3 are global, 4-7 keep the family's own window.
        (dense_config("qwen2", **QWEN, max_window_layers=4), {}, [3]),
        (dense_config("qwen2", **QWEN, max_window_layers=4), {"memory_budget": 10}, [2, 3]),
    ],
)
def test_chosen_layers_are_those_that_can_have_a_memory(dense, photon, layers):
    chosen = run(**photon)
    assert photon_config(dense, chosen).memory_layers == layers
    assert set(layers) <= set(memory_candidates(dense, chosen.photon))


def test_the_dense_architecture_is_kept_in_full():
    rope = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    dense = dense_config("llama", rope_parameters=rope, attention_bias=True, rms_norm_eps=1e-3)
    config = photon_config(dense, run())
    for each in (config, config.dense_config()):
        for key in ("rope_parameters", "attention_bias", "rms_norm_eps", "num_key_value_heads", "tie_word_embeddings"):
            assert getattr(each, key) == getattr(dense, key)


BAD = {
    "a window below the unit": (run(window=3, chunk_size=4), "photon.window=3 is shorter than photon.chunk_size=4"),
    "a memory layer outside": (run(memory_cells=["1:0", "8:0"]), "photon.memory_cells names layer 8.*0...7"),
    "a head outside": (
        run(memory_cells=["1:0", "1:2"]),
        r"photon.memory_cells names key-value head 2 of layer 1.*0\.\.\.1",
    ),
    "a head twice": (run(memory_cells=["1:0", "1:00"]), "photon.memory_cells names a head of layer 1 twice"),
    "units without memory": (
        run(memory_cells=[], chunk_size=4),
        "photon.chunk_size.*memory_cells is empty: drop one",
    ),
    "bits without memory": (run(memory_cells=[], memory_bits=8), "photon.memory_bits.*is empty: drop one"),
    "latents without memory": (
        run(memory_cells=[], latents_per_unit=2),
        "photon.latents_per_unit.*is empty: drop one",
    ),
    "memory and full attention": (
        run(memory_cells=["1:0"], full_attention_layers=[1]),
        r"layers \[1\] are in photon.memory_cells and in photon.full_attention_layers: keep one",
    ),
    "a full layer outside": (run(full_attention_layers=[9]), "photon.full_attention_layers names layer 9"),
    "a budget below a cell": (
        run(memory_budget=0.5),
        "photon.memory_budget=0.5 pays for no memory cell of this model: one takes 1.2 percent at photon.chunk_size=2 "
        "and photon.memory_bits=4; raise the budget",
    ),
    "levels": (run(levels=[LevelOverrides(chunk_size=4)]), "photon.levels is for presets split and paper.*drop it"),
    "a number of levels": (run(num_levels=1), "photon.num_levels is for presets split and paper.*drop it"),
    "consistency": (run(consistency=0.1), "consistency.weight=0.1.*preset graft"),
}


@pytest.mark.parametrize("name", BAD)
def test_settings_that_cannot_be_served_name_their_key(name):
    bad, message = BAD[name]
    with pytest.raises(PhotonError, match=message) as error:
        photon_config(eight_layers(), bad)
    assert "\n" not in str(error.value)


def test_a_window_beyond_the_dense_models_own():
    with pytest.raises(PhotonError, match="photon.window=64 exceeds the dense model's sliding_window=32"):
        photon_config(dense_config("mistral", sliding_window=32), run())


def test_what_the_dense_configuration_has_wrong_is_named_there():
    with pytest.raises(PhotonError, match="^config.json: attention_dropout=0.1 is not supported"):
        photon_config(dense_config(attention_dropout=0.1), run())
