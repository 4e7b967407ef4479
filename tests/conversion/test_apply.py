"""Conversions on disk: complete, loadable, the right values, or nothing at all."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tiny_dense import FAMILY_NAMES, save_dense
from transformers import AutoConfig, AutoModelForCausalLM

from lib.baselines import window_mask
from lib.verify import verify_preserves
from photon_train.checkpoints import with_softcap
from photon_train.config import LevelOverrides, PhotonSettings, RunConfig
from photon_train.conversion.apply import convert, rewrite_new_tensors
from photon_train.conversion.calibrate import calibrate_directory
from photon_train.conversion.plan import ConversionPlan
from photon_train.conversion.presets import make_plan, photon_config
from photon_train.conversion.scales import calibrate
from photon_train.conversion.source import INDEX, DenseCheckpoint
from photon_train.errors import PhotonError
from photon_train.manifest import verify_manifest

ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}

# The default training length lies beyond the original one: its long factors hold.
LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.0, 2.0, 3.0, 4.0],
    "original_max_position_embeddings": 16,
}

TOKENS = torch.arange(60)[None]


def run_conversion(dense, output, settings: RunConfig | None = None, dtype: str = "auto", **options):
    settings = settings or RunConfig()
    checkpoint = DenseCheckpoint.open(str(dense))
    config = photon_config(checkpoint.config, settings)
    plan = make_plan(checkpoint, config, dtype)
    convert(checkpoint, plan, config, output, progress=False, **options)
    return plan


def load(directory):
    model, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return save_dense(tmp_path_factory.mktemp("dense") / "model", max_shard_size="30KB")


@pytest.mark.parametrize(
    ("preset", "photon"),
    [
        ("graft", {}),
        ("graft", {"num_sinks": 0, "window": 12, "memory_cells": ["0:1", "2:0", "2:1"], "latents_per_unit": 2}),
        ("graft", {"memory_budget": 40, "memory_bits": 8, "window": 12}),
        ("graft", {"chunk_size": 3, "full_attention_layers": [3]}),
        ("graft", {"memory_cells": [], "window": 16}),
        ("split", {}),
        ("split", {"num_levels": 1, "levels": [LevelOverrides(num_slots=3)]}),
        ("paper", {}),
    ],
)
def test_every_preset_converts_loads_and_runs(dense, tmp_path, preset, photon):
    output = tmp_path / "photon"
    plan = run_conversion(dense, output, RunConfig(preset=preset, photon=PhotonSettings(**photon)))
    model = load(output)
    stored = {name: t for file in output.glob("*.safetensors") for name, t in load_file(file).items()}
    weights = {name: t for file in dense.glob("*.safetensors") for name, t in load_file(file).items()}
    for entry in plan.tensors:
        if entry.operator == "copy":  # `split` is shown by equal functions
            assert torch.equal(stored[entry.target], weights[entry.sources[0]]), entry.target
    tokens = torch.arange(40)[None]
    loss = model(tokens, labels=tokens).loss
    assert torch.isfinite(loss)
    loss.backward()
    assert ConversionPlan.from_json((output / "plan.json").read_text()) == plan
    verify_manifest(output)


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        *((name, {}) for name in FAMILY_NAMES),
        ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
        ("llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1}),
        ("llama", {"rope_parameters": ROPE}),
        ("qwen3", {"attention_bias": True, "head_dim": 16, "tie_word_embeddings": True}),
        ("mistral", {"sliding_window": 128}),
        ("phi3", {"sliding_window": 128, "tie_word_embeddings": True}),
        ("phi3", {"rope_parameters": LONG, "original_max_position_embeddings": 16}),
    ],
)
def test_graft_with_the_window_over_the_text_is_the_dense_model(tmp_path, model_type, changes):
    dense = save_dense(tmp_path / "dense", model_type, **changes)
    plan = run_conversion(dense, tmp_path / "photon")
    assert plan.preserves_dense
    assert verify_preserves(dense, tmp_path / "photon", length=90) <= 1e-4


def test_graft_with_layers_at_full_attention_is_the_dense_model_too(dense, tmp_path):
    settings = RunConfig(photon=PhotonSettings(full_attention_layers=[1]))
    assert run_conversion(dense, tmp_path / "photon", settings).preserves_dense
    assert verify_preserves(dense, tmp_path / "photon", length=90) <= 1e-4


@pytest.mark.parametrize("model_type", FAMILY_NAMES)
def test_graft_holds_the_dense_model(tmp_path, model_type):
    """Whatever its window: what teaches in distillation, and what the memory is fitted to."""
    dense = save_dense(tmp_path / "dense", model_type)
    run_conversion(dense, tmp_path / "photon", RunConfig(photon=PhotonSettings(window=8)))
    with torch.no_grad():
        expected = with_softcap(AutoModelForCausalLM.from_pretrained(dense)).eval()(TOKENS).logits
        model = load(tmp_path / "photon")
        assert (model(TOKENS, as_dense=True).logits - expected).abs().max() <= 1e-4
        assert (model(TOKENS).logits - expected).abs().max() > 1e-2


def test_without_memory_cells_the_graft_is_the_dense_model_with_window_and_sinks(dense, tmp_path):
    settings = RunConfig(photon=PhotonSettings(window=8, num_sinks=2, memory_cells=[]))
    run_conversion(dense, tmp_path / "photon", settings, on_written=lambda path: calibrate_directory(path, [TOKENS]))
    with torch.no_grad():
        mask = window_mask(TOKENS.shape[1], 8, 2, TOKENS.device)
        expected = AutoModelForCausalLM.from_pretrained(dense).eval()(TOKENS, attention_mask=mask).logits
        assert (load(tmp_path / "photon")(TOKENS).logits - expected).abs().max() <= 1e-4
    # No shard for what is not there.
    weight_map = json.loads((tmp_path / "photon" / INDEX).read_text())["weight_map"]
    assert {path.name for path in (tmp_path / "photon").glob("*.safetensors")} == set(weight_map.values())


@pytest.mark.parametrize("preset", ["split", "paper"])
def test_plans_that_promise_nothing_do_change_the_function(dense, tmp_path, preset):
    assert not run_conversion(dense, tmp_path / "photon", RunConfig(preset=preset)).preserves_dense
    assert verify_preserves(dense, tmp_path / "photon") > 1e-2


def test_dense_tensors_and_new_tensors_lie_in_shards_of_their_own(dense, tmp_path):
    plan = run_conversion(dense, tmp_path / "photon", max_shard_size="40KB")
    index = json.loads((tmp_path / "photon" / INDEX).read_text())
    names = sorted(set(index["weight_map"].values()))
    assert names[0] == f"model-00001-of-{len(names):05d}.safetensors" and len(names) > 2
    assert index["metadata"]["total_size"] == plan.num_bytes
    new = {name for name, file in index["weight_map"].items() if file == names[-1]}
    assert new == {entry.target for entry in plan.tensors if not entry.sources}
    for name in names[:-1]:
        assert (tmp_path / "photon" / name).stat().st_size < 50_000


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_type_can_be_chosen(dense, tmp_path, dtype):
    run_conversion(dense, tmp_path / "photon", dtype=dtype)
    wanted = getattr(torch, dtype)
    for file in (tmp_path / "photon").glob("*.safetensors"):
        assert {tensor.dtype for tensor in load_file(file).values()} == {wanted}
    assert AutoConfig.from_pretrained(tmp_path / "photon").dtype == wanted
    source = DenseCheckpoint.open(str(dense)).load("lm_head.weight")
    assert torch.equal(load(tmp_path / "photon").lm_head.weight, source.to(wanted))


def test_tokenizer_and_generation_config_come_along(dense, tmp_path):
    source = shutil.copytree(dense, tmp_path / "dense")
    (source / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0}}, "added_tokens": []}))
    (source / "tokenizer_config.json").write_text("{}")
    (source / "generation_config.json").write_text('{"max_new_tokens": 7}')
    (source / "README.md").write_text("not this")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    run_conversion(source, tmp_path / "photon")
    names = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
    for name in (*names, "additional_chat_templates/tool_use.jinja"):
        assert (tmp_path / "photon" / name).read_text() == (source / name).read_text()
    assert not (tmp_path / "photon" / "README.md").exists()


# --- bad input leaves nothing behind ---


def fails_cleanly(tmp_path, message: str, dense, **options) -> None:
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(PhotonError, match=message) as error:
        run_conversion(dense, tmp_path / "photon", **options)
    assert "\n" not in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def broken_copy(dense, tmp_path, name: str, value: float):
    source = shutil.copytree(dense, tmp_path / "dense")
    file = source / json.loads((source / INDEX).read_text())["weight_map"][name]
    weights = load_file(file)
    weights[name].view(-1)[-1] = value
    save_file(weights, file, metadata={"format": "pt"})
    return source


def test_a_weight_that_is_not_finite_leaves_nothing_behind(dense, tmp_path):
    source = broken_copy(dense, tmp_path, "model.layers.3.mlp.down_proj.weight", float("nan"))
    fails_cleanly(tmp_path, "layers.3.mlp.down_proj.weight holds NaN", source)


def test_a_weight_that_the_type_cannot_hold_leaves_nothing_behind(dense, tmp_path):
    source = broken_copy(dense, tmp_path, "model.layers.3.mlp.down_proj.weight", 1e6)
    fails_cleanly(
        tmp_path, "layers.3.mlp.down_proj.weight is not finite in float16: set export.dtype", source, dtype="float16"
    )


def test_a_type_that_is_not_exported_is_refused(tmp_path):
    """Or set: the dense model itself may be in it."""
    source = save_dense(tmp_path / "dense", dtype="float64")
    weights = {name: tensor.double() for name, tensor in load_file(source / "model.safetensors").items()}
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    fails_cleanly(tmp_path, "dense is stored in float64, .*set export.dtype=float32", source)
    run_conversion(source, tmp_path / "photon", dtype="float32")
    assert load(tmp_path / "photon").dtype == torch.float32


def test_a_directory_that_is_not_empty_is_left_as_it_was(dense, tmp_path):
    (tmp_path / "photon").mkdir()
    (tmp_path / "photon" / "mine.txt").write_text("mine")
    fails_cleanly(tmp_path, "photon is not empty", dense)
    assert (tmp_path / "photon" / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("No space left on device")])
def test_a_disk_that_fills_up_is_one_error(dense, tmp_path, error):
    """Others write to it as well, after its room was checked."""

    def fill(directory):
        raise error

    with pytest.raises(PhotonError, match="photon cannot be written: .*No space left"):
        run_conversion(dense, tmp_path / "photon", on_written=fill)
    assert not [path for path in tmp_path.iterdir() if "photon" in path.name]


def test_a_full_disk_is_noticed_before_writing(dense, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1, 1, 1000))
    fails_cleanly(tmp_path, r"has 0\.0 GB free, the converted model needs", dense)


def test_a_wrong_hash_is_noticed_before_writing(dense, tmp_path):
    from photon_train.manifest import write_manifest

    source = shutil.copytree(dense, tmp_path / "dense")
    write_manifest(source, "dense", {}, {})
    manifest = json.loads((source / "manifest.json").read_text())
    shard = next(name for name in manifest["files"] if name.endswith("safetensors"))
    manifest["files"][shard]["sha256"] = "0" * 64
    (source / "manifest.json").write_text(json.dumps(manifest))
    fails_cleanly(tmp_path, f"{shard}.*sha256", source)


def test_a_tokenizer_that_does_not_fit_is_noticed_before_writing(dense, tmp_path):
    source = shutil.copytree(dense, tmp_path / "dense")
    (source / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 64}}}))
    fails_cleanly(tmp_path, "token ids up to 64", source)


def test_a_head_that_is_called_tied_but_differs(tmp_path):
    dense = save_dense(tmp_path / "dense")
    config = json.loads((dense / "config.json").read_text())
    (dense / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    fails_cleanly(tmp_path, "lm_head.weight differs from the embedding", dense)


def test_what_the_callback_raises_undoes_the_conversion(dense, tmp_path):
    def fail(directory):
        assert (directory / INDEX).is_file()
        raise PhotonError("calibration failed")

    fails_cleanly(tmp_path, "calibration failed", dense, on_written=fail)


# --- calibration ---


def text() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(64, (2, 96), generator=generator), torch.randint(64, (1, 64), generator=generator)]


def test_calibration_gives_units_the_norm_of_what_they_summarise(dense, tmp_path):
    run_conversion(dense, tmp_path / "photon", RunConfig(preset="split"))
    model = load(tmp_path / "photon")
    scales = calibrate(model, text())
    assert set(scales) == {
        "model.levels.0.chunker.scale",
        "model.levels.1.chunker.scale",
        "model.levels.0.decoder.input_scale.weight",
        "model.levels.1.decoder.input_scale.weight",
    }
    assert all(abs(scale - 1) > 0.01 for scale in scales.values())
    # Measured anew, everything has the wanted norm: a second calibration changes nothing.
    again = calibrate(model, text())
    for name, scale in scales.items():
        assert again[name] == pytest.approx(scale, rel=1e-4)
    embeds = model.model.embed_tokens(text()[0])
    units = model.model.levels[0].chunker(embeds.unflatten(1, (-1, 4)))
    medians = [states.norm(dim=-1).median().item() for states in (units, embeds)]
    assert medians[0] == pytest.approx(medians[1], rel=0.1)


def test_a_decoder_reads_tokens_as_long_as_its_slots_but_for_the_first_group(dense, tmp_path):
    """Whose slots come from a start state of zeros; of a text of few groups it would count."""
    run_conversion(dense, tmp_path / "photon", RunConfig(preset="split"))
    model, batch, seen = load(tmp_path / "photon"), text()[0][:1, :32], []
    calibrate(model, [batch])
    for module in (model.model.levels[1].converter, model.model.levels[1].decoder.input_scale):
        module.register_forward_hook(lambda module, inputs, output: seen.append(output[0].norm(dim=-1)))
    with torch.no_grad():
        model.model(batch, use_cache=False)
    slots, units = seen[0][:2], seen[1][:8]  # groups of 16 tokens, each of 4 units
    assert abs(slots[0] - slots[1]).max() > 0.01
    assert units.median().item() == pytest.approx(slots[1:].median().item(), rel=1e-4)


def test_a_conversion_on_text_sets_the_scales_in_the_checkpoint(dense, tmp_path):
    settings, names = RunConfig(preset="split"), []
    written = tmp_path / "photon"
    run_conversion(dense, written, settings, on_written=lambda path: names.extend(calibrate_directory(path, text())))
    run_conversion(dense, tmp_path / "plain", settings)
    scales = calibrate(load(tmp_path / "plain"), text()[:1])
    stored = dict(load(written).named_parameters())
    assert names == list(scales)
    for name, scale in scales.items():
        assert stored[name].item() == pytest.approx(scale, rel=1e-5)
    verify_manifest(written)


def test_paper_can_be_calibrated(dense, tmp_path):
    run_conversion(dense, tmp_path / "photon", RunConfig(preset="paper"))
    assert len(calibrate(load(tmp_path / "photon"), text())) == 4


def test_calibration_needs_two_units_of_text(dense, tmp_path):
    run_conversion(dense, tmp_path / "photon", RunConfig(preset="split"))
    with pytest.raises(PhotonError, match="at least 32 tokens"):
        calibrate(load(tmp_path / "photon"), [torch.zeros(1, 31, dtype=torch.long)])


def test_only_new_tensors_can_be_rewritten(dense, tmp_path):
    run_conversion(dense, tmp_path / "photon")
    with pytest.raises(PhotonError, match="lm_head.weight"):
        rewrite_new_tensors(tmp_path / "photon", {"lm_head.weight": torch.zeros(64, 32)})
