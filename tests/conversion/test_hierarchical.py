"""Presets split and paper: which dense layer goes where, and settings that they cannot serve."""

from __future__ import annotations

import pytest
from tiny_dense import dense_config

from photon_train.config import ConsistencySettings, LevelOverrides, PhotonSettings, RunConfig, TrainSettings
from photon_train.conversion.hierarchical import copied_layers
from photon_train.conversion.presets import photon_config
from photon_train.errors import PhotonError


def run(preset: str, seq_len: int = 64, consistency: float = 0.0, **photon) -> RunConfig:
    return RunConfig(
        preset=preset,
        photon=PhotonSettings(**photon),
        train=TrainSettings(seq_len=seq_len),
        consistency=ConsistencySettings(weight=consistency),
    )


def eight_layers():
    return dense_config(num_hidden_layers=8)


def layers_of(dense, settings) -> tuple[list[list[int]], list[list[int]]]:
    return tuple([list(layers) for layers in stacks] for stacks in copied_layers(photon_config(dense, settings)))


@pytest.mark.parametrize(
    ("settings", "encoders", "decoders"),
    [
        (run("split"), [[0, 1], [2, 3]], [[6, 7], [4, 5]]),
        (
            run("split", levels=[LevelOverrides(encoder_layers=1), LevelOverrides(decoder_layers=1)]),
            [[0], [1, 2, 3]],
            [[5, 6, 7], [4]],
        ),
        (run("split", num_levels=3), [[0], [1], [2, 3]], [[6, 7], [5], [4]]),
        (run("split", num_levels=1), [[0, 1, 2, 3]], [[4, 5, 6, 7]]),
        (run("paper"), [[0, 1], [2, 3]], [[6, 7], [4, 5]]),
    ],
)
def test_layers_are_copied_in_order(settings, encoders, decoders):
    assert layers_of(eight_layers(), settings) == (encoders, decoders)


@pytest.mark.parametrize("total", [4, 5, 6, 7, 22, 80])
@pytest.mark.parametrize("preset", ["split", "paper"])
def test_a_partition_uses_every_dense_layer_once(preset, total):
    encoders, decoders = layers_of(dense_config(num_hidden_layers=total), run(preset))
    assert sorted(sum((*encoders, *decoders), [])) == list(range(total))


def test_paper_is_the_papers_architecture():
    config = photon_config(eight_layers(), run("paper"))
    assert (config.layout, len(config.levels), config.preset) == ("block", 2, "paper")
    assert [(level["chunk_size"], level["num_slots"]) for level in config.levels] == [(4, 4), (4, 4)]
    assert [level["encoder_window"] for level in config.levels] == [64, None]


def test_split_has_a_stream_of_tokens():
    config = photon_config(eight_layers(), run("split"))
    assert (config.layout, config.window, config.num_sinks, config.preset) == ("stream", 64, 4, "split")
    assert [(level["chunk_size"], level["num_slots"]) for level in config.levels] == [(4, 1), (4, 1)]
    assert photon_config(dense_config(hidden_size=1024), run("split")).window == 512


def test_the_default_window_reaches_over_the_top_unit():
    levels = [LevelOverrides(chunk_size=16), LevelOverrides(chunk_size=16)]
    assert photon_config(eight_layers(), run("split", seq_len=512, levels=levels)).window == 256


def test_overrides_reach_the_configuration():
    levels = [LevelOverrides(chunk_size=6, encoder_window=0), LevelOverrides(num_slots=2)]
    settings = run("split", seq_len=120, levels=levels, window=50, num_sinks=0)
    config = photon_config(eight_layers(), settings)
    assert config.levels[0]["chunk_size"] == 6 and config.levels[0]["encoder_window"] is None
    assert config.levels[1]["num_slots"] == 2
    assert (config.window, config.num_sinks, config.top_unit_tokens) == (50, 0, 24)


def test_consistency_reaches_the_configuration():
    assert photon_config(eight_layers(), run("split", consistency=0.25)).consistency_weight == 0.25


L = LevelOverrides
BAD = {
    "no hierarchy": (run("paper", num_levels=1, levels=[L(chunk_size=1)]), "photon.levels.0.chunk_size=1"),
    "window too short": (run("split", window=8), "photon.window=8.*at least 16"),
    "split depths": (
        run("split", levels=[L(encoder_layers=2, decoder_layers=2), L(encoder_layers=2, decoder_layers=3)]),
        "photon.levels.*add up to 8",
    ),
    "more stacks than layers": (run("split", num_levels=5, seq_len=1024), "5 levels.*8 dense layers.*10 stacks"),
    "no token decoder": (run("split", levels=[L(decoder_layers=0)]), "photon.levels.0.decoder_layers=0"),
    "window of blocks": (run("paper", window=64), "photon.window has no effect with preset paper"),
    "sinks of blocks": (run("paper", num_sinks=4), "photon.num_sinks has no effect with preset paper"),
    "memory": (run("split", memory_cells=["1:0"]), "photon.memory_cells has no effect with preset split"),
    "a budget": (run("paper", memory_budget=1), "photon.memory_budget has no effect with preset paper"),
    "bits of a memory": (run("split", memory_bits=8), "photon.memory_bits has no effect with preset split"),
    "units of a memory": (run("split", chunk_size=4), "photon.chunk_size has no effect with preset split"),
    "full attention": (run("split", full_attention_layers=[1]), "photon.full_attention_layers has no effect"),
    "consistency without a decoder above": (run("split", num_levels=1, consistency=0.1), "consistency.weight=0.1"),
}


@pytest.mark.parametrize("name", BAD)
def test_settings_that_cannot_be_served_name_their_key(name):
    settings, message = BAD[name]
    with pytest.raises(PhotonError, match=message) as error:
        photon_config(eight_layers(), settings)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("preset", ["split", "paper"])
def test_a_model_with_too_few_layers(preset):
    with pytest.raises(PhotonError, match="3 dense layers"):
        photon_config(dense_config(num_hidden_layers=3), run(preset))


def test_a_window_beyond_the_dense_models_own():
    with pytest.raises(PhotonError, match="photon.window=64 exceeds.*sliding_window=32"):
        photon_config(dense_config("mistral", sliding_window=32), run("split"))


def test_groups_beyond_the_dense_models_own_window():
    mixed = {"num_hidden_layers": 8, "use_sliding_window": True, "max_window_layers": 6}
    photon_config(dense_config("qwen2", sliding_window=7, **mixed), run("paper"))
    with pytest.raises(PhotonError, match=r"^photon.levels.0: 4 slots and a chunk of 4 .*sliding_window=6: lower"):
        photon_config(dense_config("qwen2", sliding_window=6, **mixed), run("paper"))
    levels = [LevelOverrides(), LevelOverrides(num_slots=40)]
    with pytest.raises(PhotonError, match=r"^photon.levels.1: 40 slots and a chunk of 4 "):
        photon_config(dense_config("qwen2", sliding_window=39, **mixed), run("split", levels=levels, window=39))
