"""The latent memory's starting values: the best of their rank, found from the text alone."""

from __future__ import annotations

import pytest
import torch
from tiny import HIERARCHIES, base_config, photon_model, shake, tokens
from tiny_dense import save_dense

from photon_train.config import PhotonSettings, RunConfig, TrainSettings
from photon_train.conversion import calibrate as calibrate_module
from photon_train.conversion.apply import convert
from photon_train.conversion.calibrate import calibrate_directory, calibration_batches
from photon_train.conversion.latents import _mean_rotation, fit_latents
from photon_train.conversion.plan import make_plan
from photon_train.conversion.presets import layer_map, photon_config
from photon_train.conversion.source import DenseCheckpoint
from photon_train.models import PhotonConfig, PhotonForCausalLM
from photon_train.models.attention_photon import FullSpan
from photon_train.models.latent_photon import join_heads


def keys_values(model, batch) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """Unrotated keys, and values, of every layer of the token decoder at full attention."""
    decoder, recorded = model.model.levels[0].decoder, {}
    embeds = model.model.embed_tokens(batch)
    position = torch.arange(batch.shape[1])[None]
    rotary = model.model.rotary_emb(embeds, position)
    decoder(decoder.input_scale(embeds), rotary, [FullSpan(recorded)] * len(decoder.layers))
    return {layer: (model.model.turn_back(key, position), value) for layer, (key, value) in recorded.items()}


@pytest.mark.parametrize("name, parts", [("memory-latent", 1), ("memory-latent-apart", 2)])
@torch.no_grad()
def test_values_are_reconstructed_better_than_by_random_maps_of_the_same_rank(name, parts):
    model, batches = photon_model(name), [tokens(8, 60, seed=seed) for seed in range(4)]
    names = fit_latents(model, batches)
    assert len(names) == parts * 2 * 3 and all(name in dict(model.named_parameters()) for name in names)
    found = keys_values(model, torch.cat(batches))
    span = model.config.top_span
    for layer in model.config.memory_layers:
        key, value = found[layer]
        grouped = [states.unflatten(2, (-1, span)) for states in (key, value)]
        units = grouped[0].shape[2]
        states = torch.zeros(len(key), units, model.config.hidden_size)
        _, read = model.model.unpack_units(layer, model.model.levels[0].decoder.latent[str(layer)](*grouped, states))
        error = (read - value).square().mean()
        x = join_heads(key, value).unflatten(1, (-1, span)).flatten(2).flatten(0, 1)
        y = value.transpose(1, 2).flatten(2).unflatten(1, (-1, span)).flatten(2).flatten(0, 1)
        x = x if parts == 1 else y
        width = x.shape[1] // span
        for seed in range(5):
            latent = x @ torch.randn(x.shape[1], width, generator=torch.Generator().manual_seed(seed))
            latent = torch.cat([latent, torch.ones(len(x), 1)], dim=1)
            rest = y - latent @ torch.linalg.lstsq(latent, y).solution
            assert error < rest.square().mean()


@torch.no_grad()
def test_what_fits_into_the_rank_is_reconstructed_exactly():
    """Where a layer's keys and values are the same for both tokens of a unit, one latent holds both."""
    model = photon_model("memory-latent-shared")
    ids = tokens(16, 30).repeat_interleave(2, dim=1)  # level 1: two tokens a unit
    fit_latents(model, [ids])
    key, value = keys_values(model, ids)[0]
    grouped = [states.unflatten(2, (-1, 2)) for states in (key, value)]
    states = torch.zeros(16, 30, model.config.hidden_size)
    latent = model.model.levels[0].decoder.latent["0"](*grouped, states)
    _, read = model.model.unpack_units(0, latent)
    torch.testing.assert_close(read, value, atol=2e-2, rtol=0)


@torch.no_grad()
def test_far_scores_are_as_large_as_near_ones_under_yarn():
    """YaRN multiplies cosines and sines; queries and keys have that factor once, whether rotated or turned back."""
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 64}
    base = base_config(rope_parameters=rope)
    whole = shake(PhotonForCausalLM(PhotonConfig(base_config=base, **HIERARCHIES["memory-latent"])))
    model = whole.model
    position, states = torch.arange(20)[None], torch.randn(1, 2, 20, 8, generator=torch.Generator().manual_seed(0))
    factor = model.rotary_emb.attention_scaling
    assert factor > 1.1
    rotated = model.apply_rotary(states, states, *model.rotary_emb(states, position))[0]
    torch.testing.assert_close(model.turn_back(rotated, position), factor * states)
    # What a far query meets is fitted to keys turned by distances alone.
    cosine, sine = _mean_rotation(whole, 0, 1)
    torch.testing.assert_close((cosine, sine), (torch.ones(8), torch.zeros(8)))


def test_text_within_the_window_will_do():
    model = photon_model("memory-latent", window=64)
    fit_latents(model, [tokens(8, 30)])
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_long_text_comes_in_small_batches(monkeypatch):
    monkeypatch.setattr(calibrate_module, "_BATCH_TOKENS", 200)
    assert [len(batch) for batch in calibration_batches(Texts())] == [2, 2, 2]
    assert [len(batch) for batch in calibration_batches(Texts(), most=1)] == [1]


def test_models_without_latents_are_left_alone():
    assert fit_latents(photon_model("memory-1"), [tokens(2, 8)]) == []


class Texts:
    def __len__(self) -> int:
        return 6

    def batch(self, indices: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.stack([tokens(1, 96, seed=int(index))[0] for index in indices])}


def test_conversion_writes_the_fitted_latents(tmp_path):
    dense = save_dense(tmp_path / "dense")
    photon = PhotonSettings(num_levels=1, memory_layers=[1, 2, 3], memory_pooling="latent", memory_latents=1)
    settings = RunConfig(photon=photon, train=TrainSettings(seq_len=96))
    checkpoint = DenseCheckpoint.open(str(dense))
    config = photon_config(checkpoint.config, settings)
    assert config.memory_sources == [1, 1, 1]
    plan = make_plan(checkpoint, config, layer_map(checkpoint.config, settings))
    assert plan.preserves_dense
    batches = calibration_batches(Texts())
    assert [len(batch) for batch in batches] == [4, 2]
    for name, written in (("plain", None), ("fitted", lambda path: calibrate_directory(path, batches))):
        convert(checkpoint, plan, config, tmp_path / name, progress=False, on_written=written)
    plain, fitted = (PhotonForCausalLM.from_pretrained(tmp_path / name).eval() for name in ("plain", "fitted"))
    names = ("latent.1.parts.0.weight", "memory.3.parts.0.weight", "memory.3.parts.0.bias")
    for name in names:
        before, after = (dict(model.model.levels[0].decoder.named_parameters())[name] for model in (plain, fitted))
        assert not torch.equal(before, after)
    ids = tokens(2, 96)
    with torch.no_grad():
        torch.testing.assert_close(fitted(ids, window=96).logits, fitted(ids, as_dense=True).logits)
        wanted = fitted(ids, as_dense=True).logits
        errors = [(model(ids).logits - wanted).square().mean() for model in (plain, fitted)]
    assert errors[1] < errors[0]
