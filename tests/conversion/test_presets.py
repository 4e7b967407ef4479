"""Presets: which dense layer goes where, and settings that they cannot serve."""

from __future__ import annotations

import pytest
from tiny_dense import dense_config

from photon_train.config import ConsistencySettings, LevelOverrides, PhotonSettings, RunConfig, TrainSettings
from photon_train.conversion.presets import layer_map, photon_config
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


@pytest.mark.parametrize(
    ("settings", "encoders", "decoders"),
    [
        (run("graft"), ((),), (tuple(range(8)),)),
        (run("graft", memory_pooling="mean"), ((0,), (1,)), (tuple(range(8)), ())),
        (run("graft", memory_pooling="mean", branch_layer=7), ((6,), (7,)), (tuple(range(8)), ())),
        (run("graft", conditioning="residual"), ((0,), (1,)), (tuple(range(8)), ())),
        (run("hourglass"), ((2, 3, 4, 5),), ((0, 1, 6, 7),)),
        (run("hourglass", branch_layer=1), ((1, 2, 3, 4),), ((0, 5, 6, 7),)),
        (run("split"), ((0, 1), (2, 3)), ((6, 7), (4, 5))),
        (run("split", conditioning="memory"), ((0, 1), (2, 3, 4)), ((5, 6, 7), ())),
        (
            run("split", levels=[LevelOverrides(encoder_layers=1), LevelOverrides(decoder_layers=1)]),
            ((0,), (1, 2, 3)),
            ((5, 6, 7), (4,)),
        ),
        (run("split", num_levels=3), ((0,), (1,), (2, 3)), ((6, 7), (5,), (4,))),
        (run("paper"), ((0, 1), (2, 3)), ((6, 7), (4, 5))),
    ],
)
def test_layers_are_copied_in_order(settings, encoders, decoders):
    layers = layer_map(eight_layers(), settings)
    assert (layers.encoders, layers.decoders) == (encoders, decoders)


@pytest.mark.parametrize("total", [4, 5, 6, 7, 22, 80])
@pytest.mark.parametrize("preset", ["hourglass", "split", "paper"])
def test_a_partition_uses_every_dense_layer_once(preset, total):
    layers = layer_map(dense_config(num_hidden_layers=total), run(preset))
    assert sorted(sum((*layers.encoders, *layers.decoders), ())) == list(range(total))


def test_graft_defaults():
    config = photon_config(eight_layers(), run("graft"))
    assert (config.layout, config.conditioning, config.window, config.num_sinks) == ("stream", "memory", 64, 4)
    assert [(level["chunk_size"], level["encoder_layers"]) for level in config.levels] == [(4, 0)]
    assert (config.memory_pooling, config.memory_layers, config.memory_sources) == ("latent", [7], [7])


@pytest.mark.parametrize(
    ("total", "layers", "chunk_size"),
    [(1, [0], 8), (4, [3], 8), (16, [11, 15], 4), (22, [16, 21], 4), (32, [19, 23, 27, 31], 4)],
)
def test_latents_of_the_default_take_at_most_a_thirtieth_of_the_dense_cache(total, layers, chunk_size):
    config = photon_config(dense_config(num_hidden_layers=total), run("graft"))
    assert (config.memory_layers, config.top_span) == (layers, chunk_size)
    assert len(layers) / (total * chunk_size) <= 0.032 or total < 4


@pytest.mark.parametrize(("kv_heads", "chosen", "parts"), [(16, None, 1), (32, None, 2), (32, 1, 1), (16, 2, 2)])
def test_wide_latents_are_packed_in_two_parts(kv_heads, chosen, parts):
    dense = dense_config(num_attention_heads=32, num_key_value_heads=kv_heads, head_dim=128, num_hidden_layers=8)
    assert photon_config(dense, run("graft", memory_latent_parts=chosen)).memory_latent_parts == parts
    if chosen is None:
        assert photon_config(dense, run("graft", memory_pooling="mean")).memory_latent_parts == 1


def test_pooled_memory_has_two_levels():
    config = photon_config(eight_layers(), run("graft", memory_pooling="mean"))
    assert [level["chunk_size"] for level in config.levels] == [4, 4]
    assert [level["encoder_window"] for level in config.levels] == [64, None]
    assert config.memory_layers == [1, 3, 5, 7] and config.memory_levels == [2] * 4


def test_the_window_is_wider_for_real_models():
    assert photon_config(dense_config(hidden_size=1024), run("graft")).window == 256


def test_the_default_window_reaches_over_the_top_unit():
    levels = [LevelOverrides(chunk_size=16), LevelOverrides(chunk_size=16)]
    assert photon_config(eight_layers(), run("graft", seq_len=512, levels=levels)).window == 256


def test_paper_is_the_papers_architecture():
    config = photon_config(eight_layers(), run("paper"))
    assert (config.layout, config.conditioning, config.num_levels) == ("block", "slots", 2)
    assert [(level["chunk_size"], level["num_slots"]) for level in config.levels] == [(4, 4), (4, 4)]


def test_overrides_reach_the_configuration():
    levels = [LevelOverrides(chunk_size=6, encoder_window=0)]
    settings = run("graft", seq_len=120, num_levels=2, levels=levels, window=50, num_sinks=0)
    config = photon_config(eight_layers(), settings)
    assert config.levels[0]["chunk_size"] == 6 and config.levels[0]["encoder_window"] is None
    assert (config.window, config.num_sinks, config.top_span) == (50, 0, 24)


@pytest.mark.parametrize(
    ("count", "sources"), [(None, [1, 3, 4, 5, 7]), (1, [1] * 5), (2, [1, 1, 1, 5, 5]), (5, [1, 3, 4, 5, 7])]
)
def test_consecutive_memory_layers_share_latents(count, sources):
    settings = run("graft", memory_layers=[1, 3, 4, 5, 7], memory_pooling="latent", memory_latents=count)
    config = photon_config(eight_layers(), settings)
    assert (config.memory_pooling, config.memory_sources) == ("latent", sources)


def test_the_dense_architecture_is_kept_in_full():
    rope = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    dense = dense_config("llama", rope_parameters=rope, attention_bias=True, rms_norm_eps=1e-3)
    base = photon_config(dense, run("graft")).family_config()
    for key in ("rope_parameters", "attention_bias", "rms_norm_eps", "num_key_value_heads", "tie_word_embeddings"):
        assert getattr(base, key) == getattr(dense, key)


L = LevelOverrides
BAD = {
    "block graft": (run("graft", layout="block"), "photon.layout='block'.*graft"),
    "hourglass with memory": (run("hourglass", conditioning="memory"), "photon.conditioning='memory'.*residual"),
    "hourglass with two levels": (run("hourglass", num_levels=2), "photon.num_levels=2.*hourglass"),
    "no hierarchy": (run("hourglass", levels=[L(chunk_size=1)]), "photon.levels.0.chunk_size=1"),
    "sequence between units": (run("split", seq_len=72), "train.seq_len=72.*16 tokens"),
    "window too short": (run("split", window=8), "photon.window=8.*at least 16"),
    "slots with memory": (run("graft", levels=[L(num_slots=2)]), "photon.levels.0.num_slots.*memory"),
    "slots between children": (
        run("graft", conditioning="residual", levels=[L(num_slots=3)]),
        "photon.levels.0.num_slots must be 1 or chunk_size",
    ),
    "graft without a layer": (run("graft", levels=[L(decoder_layers=7)]), "photon.levels.0.decoder_layers=7"),
    "graft with a decoder": (
        run("graft", conditioning="slots", levels=[L(), L(decoder_layers=1)]),
        "photon.levels.1.decoder_layers=1",
    ),
    "more copies than layers": (run("graft", levels=[L(encoder_layers=9)]), "encoder_layers add up to 9.*8 layers"),
    "hourglass depths": (
        run("hourglass", levels=[L(encoder_layers=4, decoder_layers=5)]),
        "encoder_layers=4 and decoder_layers=5.*8 dense layers",
    ),
    "split depths": (
        run("split", levels=[L(encoder_layers=2, decoder_layers=2), L(encoder_layers=2, decoder_layers=3)]),
        "photon.levels.*add up to 8",
    ),
    "more stacks than layers": (run("split", num_levels=5, seq_len=1024), "5 levels.*8 dense layers.*10 stacks"),
    "no token decoder": (run("split", levels=[L(decoder_layers=0)]), "photon.levels.0.decoder_layers=0"),
    "decoder with memory": (
        run("split", conditioning="memory", levels=[L(), L(decoder_layers=1)]),
        "photon.levels.1.decoder_layers=1.*memory",
    ),
    "branch outside": (run("graft", branch_layer=8), "photon.branch_layer=8.*0...7"),
    "branch of split": (run("split", branch_layer=1), "photon.branch_layer=1.*split"),
    "branch with slots": (run("graft", conditioning="slots", branch_layer=1), "photon.conditioning=slots"),
    "memory layer outside": (run("graft", memory_layers=[1, 8]), "photon.memory_layers names layer 8.*0...7"),
    "memory layer below branch": (
        run("graft", branch_layer=2, memory_layers=[1]),
        "layer 1, below photon.branch_layer",
    ),
    "no memory layer": (run("graft", memory_layers=[]), "photon.memory_layers is empty"),
    "memory and full": (run("graft", memory_layers=[1], full_attention_layers=[1]), r"layers \[1\].*keep one"),
    "full layer outside": (run("graft", full_attention_layers=[9]), "photon.full_attention_layers names layer 9"),
    "memory level outside": (run("graft", memory_level=3, num_levels=2), "photon.memory_level=3.*1...2"),
    "memory level below the top": (
        run("graft", memory_level=1, num_levels=2),
        "photon.memory_level=1.*photon.num_levels=1",
    ),
    "memory layers without memory": (
        run("graft", conditioning="residual", memory_layers=[1]),
        "photon.memory_layers needs photon.conditioning=memory",
    ),
    "latents without latent pooling": (
        run("graft", memory_latents=1, memory_pooling="mean"),
        "photon.memory_latents=1 needs photon.memory_pooling=latent",
    ),
    "parts of a latent without latent pooling": (
        run("graft", memory_latent_parts=2, memory_pooling="mean"),
        "photon.memory_latent_parts=2 needs photon.memory_pooling=latent",
    ),
    "more latents than layers": (
        run("graft", memory_layers=[1], memory_pooling="latent", memory_latents=2),
        r"photon.memory_latents=2 must be in 1\.\.\.1",
    ),
    "window of blocks": (run("paper", window=64), "photon.window has no effect with layout block"),
    "consistency without a decoder": (run("graft", consistency=0.1), "consistency.weight=0.1"),
}


@pytest.mark.parametrize("name", BAD)
def test_settings_that_cannot_be_served_name_their_key(name):
    settings, message = BAD[name]
    with pytest.raises(PhotonError, match=message) as error:
        photon_config(eight_layers(), settings)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("preset", "total"), [("hourglass", 2), ("split", 3), ("paper", 3)])
def test_a_model_with_too_few_layers(preset, total):
    with pytest.raises(PhotonError, match=f"{total} (dense )?layers|model has {total}"):
        photon_config(dense_config(num_hidden_layers=total), run(preset))


def test_a_window_beyond_the_dense_models_own():
    with pytest.raises(PhotonError, match="photon.window=64 exceeds.*sliding_window=32"):
        photon_config(dense_config("mistral", sliding_window=32), run("graft"))
