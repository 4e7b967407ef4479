"""Every family of the registry, converted from a directory on disk: what it computes, cached, padded and served."""

from __future__ import annotations

import importlib
import math

import brute_force
import pytest
import torch
from brute_force import Rules
from tiny import photon_model, shake, tokens
from tiny_dense import FAMILY_NAMES, save_dense
from transformers import AutoConfig, AutoModelForCausalLM

from photon_train.checkpoints import with_softcap
from photon_train.config import PhotonSettings, RunConfig
from photon_train.conversion import latents
from photon_train.conversion.apply import convert
from photon_train.conversion.cells import summed_loss
from photon_train.conversion.dense_attention import DenseAttention
from photon_train.conversion.graft import memory_candidates
from photon_train.conversion.presets import make_plan, photon_config
from photon_train.conversion.source import DenseCheckpoint
from photon_train.errors import PhotonError
from photon_train.inference.engine import Engine, EngineSettings
from photon_train.inference.request import SamplingParams
from photon_train.layouts import LAYOUTS
from photon_train.models.attention_photon import unrotate
from photon_train.models.families_photon import family, has_rotation, is_interleaved, rotation_kind
from photon_train.models.memory_photon import LayerMemory
from photon_train.training.losses import TrainingObjective

HYBRIDS = tuple(name for name in FAMILY_NAMES if LAYOUTS[name].mixer)
LENGTH = 40
IDS = torch.randint(3, 64, (2, LENGTH), generator=torch.Generator().manual_seed(0))
NEW = 6


def converted(dense, output, **photon):
    """The model that a conversion writes, its memory shaken like everything else."""
    settings = {"window": 6, "num_sinks": 2, "chunk_size": 2, "memory_bits": 16, "full_attention_layers": [3]}
    checkpoint = DenseCheckpoint.open(str(dense))
    candidates = memory_candidates(checkpoint.config, PhotonSettings(full_attention_layers=[3]))
    cells = [f"{layer}:{layer // 2 % 2}" for layer in candidates]
    run = RunConfig(photon=PhotonSettings(**{**settings, "memory_cells": cells, **photon}))
    config = photon_config(checkpoint.config, run)
    convert(checkpoint, make_plan(checkpoint, config), config, output, progress=False)
    model, info = AutoModelForCausalLM.from_pretrained(output, output_loading_info=True)
    assert not any(info.values()), info
    for module in model.modules():
        if isinstance(module, LayerMemory):
            shake(module)
    return model.eval()


@pytest.fixture(scope="module", params=FAMILY_NAMES)
def dense(request, tmp_path_factory):
    return save_dense(tmp_path_factory.mktemp(request.param) / "dense", request.param)


@pytest.fixture(scope="module")
def model(dense):
    return converted(dense, dense.parent / "photon")


@torch.no_grad()
def test_a_window_over_the_text_gives_the_dense_logits(dense, tmp_path):
    family_window = getattr(AutoConfig.from_pretrained(dense), "sliding_window", None)
    found = converted(dense, tmp_path / "photon", window=max(LENGTH, family_window or 0))(IDS).logits
    expected = with_softcap(AutoModelForCausalLM.from_pretrained(dense)).eval()(IDS).logits
    assert expected.std() > 0.1  # else any two models agree
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_the_probe_of_cells_runs_the_dense_model(dense):
    """As it is, and with every cell's gate open."""
    expected = with_softcap(AutoModelForCausalLM.from_pretrained(dense)).eval()(IDS).logits
    model, attention = (
        AutoModelForCausalLM.from_pretrained(dense, attn_implementation="photon").eval(),
        DenseAttention(IDS),
    )
    layers = memory_candidates(model.config, PhotonSettings())
    gates = {layer: torch.ones(2) for layer in layers}
    for segments in (attention.dense(model.config), attention.restricted(model.config, 6, 2, layers, gates)):
        found = model(IDS, use_cache=False, photon_segments=segments).logits
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_losses_in_chunks_are_the_familys_own(model, dense):
    """Of training, and of the probe, whose logits are never whole: factors and bounds of logits are on them."""
    expected = model(IDS, labels=IDS, use_cache=False).loss.item()
    count = len(IDS) * (LENGTH - 1)
    losses = TrainingObjective(model)
    found = losses(IDS, IDS, torch.tensor(count), torch.tensor(2))["ce"].item()
    assert found == pytest.approx(expected, abs=1e-4)
    taught = AutoModelForCausalLM.from_pretrained(dense, attn_implementation="photon").eval()
    segments = DenseAttention(IDS).dense(taught.config)
    wanted = model(IDS, labels=IDS, as_dense=True, use_cache=False).loss.item()
    with torch.no_grad():
        assert summed_loss(taught, IDS, torch.ones_like(IDS, dtype=torch.bool), segments) / count == pytest.approx(
            wanted, abs=1e-4
        )


@pytest.mark.parametrize("sizes", [[1] * LENGTH, [13, 1, 9, 17]], ids=["token by token", "in chunks"])
@torch.no_grad()
def test_decoding_gives_the_logits_of_a_whole_pass(model, sizes):
    whole, cache, found = model(IDS, use_cache=False).logits, model.new_cache(), []
    for part in IDS.split(sizes, dim=1):
        found.append(model(part, past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(found, dim=1), whole, atol=2e-4, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padded_rows_get_what_they_get_alone(model, side):
    short = 23
    alone, mask, ids = model(IDS[1:, :short], use_cache=False).logits[0], torch.ones_like(IDS), IDS.clone()
    own = slice(LENGTH - short, LENGTH) if side == "left" else slice(0, short)
    mask[1], ids[1] = 0, 5
    mask[1, own], ids[1, own] = 1, IDS[1, :short]
    found = model(ids, attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(found[1, own], alone, atol=2e-4, rtol=0)
    torch.testing.assert_close(found[0], model(IDS[:1], use_cache=False).logits[0], atol=2e-4, rtol=0)
    if side == "right" and model.config.base_model_type in HYBRIDS:
        # A state has read whatever follows a row's last token.
        with pytest.raises(ValueError, match="recurrent layers.*pad on the left"):
            model(ids, attention_mask=mask, use_cache=True)
        assert model(ids, attention_mask=mask).past_key_values is None
        return
    cache, parts = model.new_cache(), []
    for begin, stop in ((0, 25), (25, 26), (26, LENGTH)):
        parts.append(model(ids[:, begin:stop], attention_mask=mask[:, :stop], past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(parts, dim=1)[1, own], alone, atol=2e-4, rtol=0)


@torch.no_grad()
def test_packed_documents_do_not_see_each_other(model):
    position = torch.cat([torch.arange(17), torch.arange(LENGTH - 17)])[None]
    found = model(IDS[:1], position_ids=position, use_cache=False).logits[0]
    for part in (slice(0, 17), slice(17, LENGTH)):
        torch.testing.assert_close(found[part], model(IDS[:1, part], use_cache=False).logits[0], atol=2e-4, rtol=0)


@torch.no_grad()
def test_the_engine_writes_what_generate_writes(model):
    model.generation_config.eos_token_id = None
    if model.config.base_model_type in HYBRIDS:  # there is no pool of states
        with pytest.raises(PhotonError, match=f"states of a hybrid .{model.config.base_model_type}.: use generate"):
            Engine(model)
        return
    prompts = [IDS[0, :length].tolist() for length in (1, 17, 31)]
    expected = [
        model.generate(torch.tensor([ids]), max_new_tokens=NEW, do_sample=False, pad_token_id=0)[0, len(ids) :].tolist()
        for ids in prompts
    ]
    engine = Engine(model, settings=EngineSettings(max_length=64, segment_tokens=5, max_prefixes=0))
    answers = engine.generate(prompts, SamplingParams(max_new_tokens=NEW))
    assert [answer[0].tokens for answer in answers] == expected


def test_gradients_reach_every_parameter_of_the_memory(model):
    model.train()
    model(IDS, labels=IDS).loss.backward()
    model.eval()
    for name, parameter in model.named_parameters():
        if ".memory." in name:
            assert parameter.grad.abs().max() > 0, name
    model.zero_grad()


@torch.no_grad()
def test_rotations_are_undone_but_for_their_length(model):
    """YaRN makes what it rotates longer: queries and keys have that factor once, whether rotated or not."""
    config, states = model.config, torch.randn(1, 2, 30, 8, generator=torch.Generator().manual_seed(0))
    position = torch.arange(30)[None]
    apply = importlib.import_module(family(config.base_model_type).rotary.__module__).apply_rotary_pos_emb
    for layer in config.memory_layers:
        rotary = model.model.rotation(position, layer)
        if not has_rotation(config, layer):
            assert unrotate(states, rotary) is states
            continue
        kind = rotation_kind(config, layer)
        kinds = () if kind is None else (kind,)
        # Qwen 3.5 counts time, height and width.
        given = position.expand(3, -1, -1) if config.base_model_type == "qwen3_5_text" else position
        rotated = apply(states, states, *model.model.rotary_emb(states, given, *kinds))[0]
        assert (rotated[:, :, 1:] - states[:, :, 1:]).abs().amax(-1).min() > 1e-3
        factor = 1.0
        if config.rope_parameters.get(kind, config.rope_parameters)["rope_type"] == "yarn":
            factor = 1 + 0.1 * math.log(4)
        torch.testing.assert_close(unrotate(rotated, rotary, is_interleaved(config)), factor * states)


# --- against float64 loops ---


def _rms(eps: float, add: float = 0.0, whole: bool = False):
    def norm(states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        flat = states.flatten(1) if whole else states
        return brute_force.norm(flat, weight + add, eps).view(states.shape)

    return norm


def _plain(theta: float, **more):
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta, **more}}


def rules(config, layer: int) -> Rules:
    """What a layer's attention does, from the families' papers and configurations."""
    name, size = config.base_model_type, config.head_dim
    rope = config.rope_parameters
    kinds = getattr(config, "layer_types", None)
    local = bool(kinds) and kinds[layer] == "sliding_attention"
    if "full_attention" in rope:
        rope = rope[kinds[layer]]
    found = Rules(rope["rope_theta"], slower=rope.get("factor", 1.0), window=config.sliding_window if local else None)
    if name in ("olmo2", "olmo3", "olmoe"):
        found.norms = _rms(config.rms_norm_eps, whole=True)
    if name in ("exaone4", "qwen3", "qwen3_moe"):
        found.norms = _rms(config.rms_norm_eps)
    if name == "lfm2":
        found.norms = _rms(config.norm_eps)
    if name == "qwen3_5_text":
        found.norms, found.gated, found.rotated = _rms(config.rms_norm_eps, add=1.0), True, size // 2
    if name in ("granite", "granitemoe"):
        found.scale = config.attention_multiplier
    if name == "smollm3" and not config.no_rope_layers[layer]:
        found.rotated = 0
    if name in ("cohere2", "exaone4") and not local:
        found.rotated = 0
    if name in ("gemma2", "gemma3_text"):
        found.scale = config.query_pre_attn_scalar**-0.5
    if name == "gemma2":
        found.softcap = config.attn_logit_softcapping
    if name == "gpt_oss":
        found.has_sink_logits = True
    if name == "gemma3_text":
        found.norms = _rms(config.rms_norm_eps, add=1.0)
    if name in ("cohere2", "glm4"):
        found.neighbours = True
    if name == "glm4":
        found.rotated = size // 2
    if name == "ministral3":
        original, beta = rope["original_max_position_embeddings"], rope["llama_4_scaling_beta"]
        found.gain = lambda position: 1 + beta * math.log(1 + position // original)
    return found


# The rotations of those that stretch them for long texts.
PLAIN = {
    "olmo3": {"rope_parameters": {kind: {"rope_type": "default", "rope_theta": theta} for kind, theta in (
        ("full_attention", 300.0), ("sliding_attention", 20.0))}},
    "olmoe": {"clip_qkv": None},  # which is met above, by the dense logits
    "gpt_oss": _plain(1e4),
    "ministral3": _plain(1e4, llama_4_scaling_beta=0.3, original_max_position_embeddings=16),
}  # fmt: skip
BY_KEY = {"seed_oss": {"attention_bias": True, "attention_out_bias": True}, "granite": {"attention_bias": True}}


def converted_plain(name, directory, **photon):
    dense = save_dense(directory / "dense", name, **PLAIN.get(name, {}), **BY_KEY.get(name, {}))
    return converted(dense, directory / "photon", **photon)


def watch(model) -> dict[int, list[tuple[torch.Tensor, torch.Tensor]]]:
    """What enters and leaves the attention of each layer from now on, of the first row."""
    layers = [layer for layer in range(model.config.num_hidden_layers) if layer not in model.config.recurrent_layers]
    seen: dict[int, list] = {layer: [] for layer in layers}

    def record(module, args, kwargs, output):
        states = args[0] if args else kwargs["hidden_states"]
        seen[module.layer_idx].append((states[0], output[0][0]))

    for layer in layers:
        model.model.layers[layer].self_attn.register_forward_hook(record, with_kwargs=True)
    return seen


def weights(model, layer: int) -> dict[str, torch.Tensor]:
    own = model.model.layers[layer].self_attn.state_dict()
    llama = {own: name for name, own in LAYOUTS[model.config.base_model_type].names.items()}
    renamed = {".".join(llama.get(part, part) for part in name.split(".")): tensor for name, tensor in own.items()}
    return {f"self_attn.{name}": tensor.double() for name, tensor in renamed.items()}


@pytest.mark.parametrize("name", FAMILY_NAMES)
@torch.no_grad()
def test_each_layers_attention_is_what_the_family_defines(name, tmp_path):
    """In a whole pass and token by token; layers 0 and 1 are of both kinds, where there are two."""
    model = converted_plain(name, tmp_path).double()
    model.config._experts_implementation = "eager"  # the default one knows no float64
    config, ids = model.config, IDS[:1, :22]
    seen = watch(model)
    model(ids, use_cache=False)
    cache = model.new_cache()
    for part in ids.split(1, dim=1):
        model(part, past_key_values=cache)
    assert 1 in config.memory_cells  # which reads far tokens: 22 lie beyond window and sinks
    for layer in {0, 1} - {*config.recurrent_layers}:
        (states, whole), *steps = seen[layer]
        expected = brute_force.attention(weights(model, layer), config.to_dict(), layer, states, rules(config, layer))
        # The family computes norms and rotations in fp32, whatever the weights are.
        torch.testing.assert_close(whole, expected, atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(torch.cat([out for _, out in steps]), expected, atol=5e-5, rtol=1e-5)


@pytest.mark.parametrize("name", FAMILY_NAMES)
@torch.no_grad()
def test_the_fit_meets_keys_as_far_queries_do(name, tmp_path, monkeypatch):
    """It runs the dense model and reads keys without their rotation; and in units of one token, where packing loses
    nothing, its latents give each key turned back by the distances beyond the window, in the mean."""
    model, read = converted_plain(name, tmp_path, chunk_size=1), []
    config, units = model.config, latents._units

    def spy(keys, *args):
        read.append(keys)
        return units(keys, *args)

    monkeypatch.setattr(latents, "_units", spy)
    monkeypatch.setattr(latents, "RIDGE", 1e-8)  # which would show in weights that were shaken
    seen = watch(model)
    latents.fit_latents(model, [IDS])
    model(IDS, as_dense=True)
    for (_, fitted), (_, dense) in seen.values():
        torch.testing.assert_close(fitted, dense, atol=1e-4, rtol=1e-4)
    for number, layer in enumerate(config.memory_layers):
        found, (states, _) = rules(config, layer), seen[layer][0]
        projected = brute_force.project(weights(model, layer), config.to_dict(), states.double(), found)
        cells = config.memory_cells[layer]
        expected = projected["k"][:, cells].transpose(0, 1)
        torch.testing.assert_close(read[2 * number][0].double(), expected, atol=1e-4, rtol=1e-4)
        keys, values = torch.randn(2, 1, len(cells), 3, config.head_dim, generator=torch.Generator().manual_seed(0))
        memory = model.model.layers[layer].self_attn.memory
        far_keys, far_values = memory.unpack(*memory.pack(keys, values)[0])
        turned = [brute_force.rotate(key, -away, found) for key in keys[0, 0] for away in range(config.window, LENGTH)]
        mean = torch.stack(turned).view(3, -1, config.head_dim).mean(1)
        torch.testing.assert_close(far_keys[0, 0], mean, atol=2e-2, rtol=2e-2)
        torch.testing.assert_close(far_values, values, atol=2e-2, rtol=2e-2)


@torch.no_grad()
def test_windows_of_local_layers_hold_beyond_a_block_of_queries():
    """As the dense model: against transformers, on a text of several blocks."""
    local = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}
    model = photon_model("memory", "qwen2", memory_cells={0: [0, 1]}, **local)
    dense = AutoModelForCausalLM.from_config(model.config.dense_config()).eval()
    assert not dense.load_state_dict(model.state_dict(), strict=False).missing_keys
    ids = tokens(1, 300)
    torch.testing.assert_close(model(ids, as_dense=True).logits, dense(ids).logits, atol=1e-4, rtol=1e-4)


def test_without_windows_exaone_rotates_every_layer():
    """EXAONE 4 1.2B has none; with some, its global layers know no position."""
    kinds = {"layer_types": ["full_attention"] * 3}
    whole = photon_model("memory", "exaone4", sliding_window=None, **kinds)
    assert all(whole.model.rotation(torch.arange(5)[None], layer)[0].shape[-1] == 8 for layer in range(3))
    mixed = photon_model("memory", "exaone4", sliding_window=16, **kinds)
    assert mixed.model.rotation(torch.arange(5)[None], 0)[0].shape[-1] == 0
