"""Every kind of broken checkpoint is one clear error, found before a tensor is read where that is possible."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tiny_dense import save_dense

from photon_train.checkpoints import read_config
from photon_train.conversion.safetensors_io import read_header
from photon_train.conversion.source import INDEX, DenseCheckpoint
from photon_train.errors import PhotonError
from photon_train.manifest import write_manifest


@pytest.fixture
def single(tmp_path):
    return save_dense(tmp_path / "single")


@pytest.fixture
def sharded(tmp_path):
    return save_dense(tmp_path / "sharded", max_shard_size="30KB")


def open_fails(directory, *words: str) -> None:
    with pytest.raises(PhotonError) as error:
        DenseCheckpoint.open(str(directory))
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def shards_of(directory):
    return sorted(directory.glob("model-*.safetensors"))


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("kind", ["single", "sharded"])
def test_tensors_are_read_as_they_were_written(kind, request):
    directory = request.getfixturevalue(kind)
    checkpoint = DenseCheckpoint.open(str(directory))
    stored = {name: t for file in directory.glob("*.safetensors") for name, t in load_file(file).items()}
    assert set(checkpoint.tensors) == set(stored)
    for name, tensor in stored.items():
        assert torch.equal(checkpoint.load(name), tensor)


def test_a_plan_needs_the_configuration_alone(single):
    """Of a directory without any weights; one that lost a part of them is refused as always."""
    expected = {name: info.shape for name, info in DenseCheckpoint.open(str(single)).tensors.items()}
    (single / "model.safetensors").rename(single / "model-00001-of-00002.safetensors")
    with pytest.raises(PhotonError, match=r"shards but no model\.safetensors\.index\.json"):
        DenseCheckpoint.open(str(single), weights=False)
    (single / "model-00001-of-00002.safetensors").unlink()
    checkpoint = DenseCheckpoint.open(str(single), weights=False)
    assert {name: info.shape for name, info in checkpoint.tensors.items()} == expected
    open_fails(single, "model.safetensors")


def test_bfloat16_is_read_bit_for_bit(single):
    weights = {name: tensor.bfloat16() for name, tensor in load_file(single / "model.safetensors").items()}
    save_file(weights, single / "model.safetensors", metadata={"format": "pt"})
    checkpoint = DenseCheckpoint.open(str(single))
    assert checkpoint.dtype == torch.bfloat16
    assert torch.equal(checkpoint.load("lm_head.weight"), weights["lm_head.weight"])


def test_a_directory_that_does_not_exist(tmp_path):
    open_fails(tmp_path / "nothing", "nothing", "no such directory")


def test_a_file_instead_of_its_directory(single):
    open_fails(single / "model.safetensors", "is a file", "directory")


def test_an_unreachable_hub_id():
    open_fails("nobody/nothing-at-all", "nobody/nothing-at-all", "neither a directory nor reachable on the hub")


def test_no_config(single):
    (single / "config.json").unlink()
    open_fails(single, "no config.json")


def test_config_that_is_not_json(single):
    (single / "config.json").write_text("{")
    open_fails(single, "config.json", "not valid JSON")


def test_a_family_that_is_not_supported(single):
    edit_json(single / "config.json", model_type="gpt2")
    open_fails(single, "config.json", "gpt2", "llama, ministral3, mistral")


@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rope_parameters": {"rope_type": "mrope"}}, ["'mrope' is not one of default, ", "same as default"]),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}, ["'mrope' is not one of default, "]),
        ({"rope_scaling": {"type": "warp"}}, ["rope type 'warp' is not one of default, dynamic, "]),
        ({"rope_scaling": {"type": "su", "short_factor": [1.0]}}, ["'su' is the former name of longrope", "write"]),
        ({"rope_parameters": {"rope_type": "yarn"}}, ["Missing required keys", "'factor'"]),
        ({"pad_token_id": 64}, ["pad_token_id=64", "vocab_size=64", "set it to null"]),
        ({"pad_token_id": -65}, ["pad_token_id=-65"]),
        ({"hidden_act": "softsign2"}, ["cannot build a model of it (KeyError: 'softsign2')"]),
        ({"num_attention_heads": 3}, ["hidden size (32) is not a multiple"]),
    ],
)
def test_a_config_of_which_no_model_can_be_built(single, changes, words, weights):
    edit_json(single / "config.json", **changes)
    with pytest.raises(PhotonError) as error:
        DenseCheckpoint.open(str(single), weights=weights)
    for word in ["config.json", *words]:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


def test_a_padding_token_may_be_counted_from_the_end(single):
    edit_json(single / "config.json", pad_token_id=-1)
    DenseCheckpoint.open(str(single))


def test_a_quantised_checkpoint(single):
    edit_json(single / "config.json", quantization_config={"quant_method": "gptq"})
    open_fails(single, "quantised")


def test_pickled_weights_are_refused(single):
    (single / "model.safetensors").rename(single / "pytorch_model.bin")
    open_fails(single, "pickle", "save_pretrained")


def test_an_adapter_beside_the_weights_is_not_ignored(single, tmp_path):
    """transformers would load it for the teacher and the probe; the converted weights would be without it."""
    (single / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "x/y"}))
    open_fails(single, "adapter_config.json", "beside the model", "merge_and_unload")
    with pytest.raises(PhotonError, match="beside the model"):
        DenseCheckpoint.open(str(single), weights=False)
    with pytest.raises(PhotonError, match="beside the model"):
        read_config(single)
    (single / "config.json").unlink()
    open_fails(single, "is a PEFT adapter, not a model", "merge_and_unload")


def test_no_weights(single):
    (single / "model.safetensors").unlink()
    open_fails(single, "neither model.safetensors nor")


def test_shards_without_index(sharded):
    (sharded / INDEX).unlink()
    open_fails(sharded, INDEX)


def test_a_missing_shard(sharded):
    shard = shards_of(sharded)[1]
    shard.unlink()
    open_fails(sharded, shard.name, "missing")


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_shard(sharded, keep):
    shard = shards_of(sharded)[0]
    shard.write_bytes(shard.read_bytes()[:keep])
    open_fails(sharded, shard.name, "truncated")


def test_a_shard_with_bytes_too_many(sharded):
    shard = shards_of(sharded)[0]
    shard.write_bytes(shard.read_bytes() + b"x")
    open_fails(sharded, shard.name, "corrupt")


def test_a_corrupt_header(single):
    path = single / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[8:12] = b"oops"
    path.write_bytes(content)
    open_fails(single, "model.safetensors", "corrupt")


def write_header(path, num_bytes: int, **tensors):
    """A safetensors file of zeros with `num_bytes` of data; `tensors` are shape and offsets by name."""
    entries = {name: {"dtype": "F32", "shape": s, "data_offsets": offsets} for name, (s, offsets) in tensors.items()}
    header = json.dumps(entries).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(num_bytes))
    return path


@pytest.mark.parametrize("offsets", [[0, 4], [-8, 0], "no", [0, 8, 8], [0], [0.0, 8.0], ["0", "8"]])
def test_a_header_with_impossible_offsets(single, offsets):
    write_header(single / "model.safetensors", 8, x=([2], offsets))
    open_fails(single, "model.safetensors", "corrupt safetensors header")


@pytest.mark.parametrize(
    "tensors",
    [
        {"x": ([2], [0, 8]), "y": ([2], [4, 12])},
        {"x": ([3], [0, 12]), "y": ([1], [4, 8])},
        {"x": ([1], [0, 4]), "y": ([1], [8, 12])},
        {"x": ([2], [4, 12])},
        {"x": ([-1, -3], [0, 12])},
    ],
    ids=["overlap", "inside", "hole", "hole first", "negative"],
)
def test_a_header_that_safetensors_refuses(tmp_path, tensors):
    path = write_header(tmp_path / "x.safetensors", 12, **tensors)
    with pytest.raises(SafetensorError):
        load_file(path)
    with pytest.raises(PhotonError, match="corrupt safetensors header"):
        read_header(path)


def test_tensors_may_lie_in_any_order_and_be_empty(tmp_path):
    tensors = {"b": ([1], [8, 12]), "empty": ([0], [8, 8]), "a": ([2], [0, 8])}
    path = write_header(tmp_path / "x.safetensors", 12, **tensors)
    assert list(read_header(path)) == list(tensors) and set(load_file(path)) == set(tensors)


def test_a_git_lfs_pointer(single):
    (single / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    open_fails(single, "git lfs pull")


def test_an_index_that_names_the_wrong_shard(sharded):
    index = json.loads((sharded / INDEX).read_text())["weight_map"]
    other = next(shard for shard in index.values() if shard != index["model.norm.weight"])
    edit_json(sharded / INDEX, weight_map={**index, "model.norm.weight": other})
    open_fails(sharded, "model.norm.weight", other)


def test_an_index_that_leads_outside(sharded):
    index = json.loads((sharded / INDEX).read_text())["weight_map"]
    edit_json(sharded / INDEX, weight_map={**index, "model.norm.weight": "../x.safetensors"})
    open_fails(sharded, "outside")


def test_a_tensor_in_two_shards(sharded):
    first, second = shards_of(sharded)[:2]
    name, tensor = next(iter(load_file(first).items()))
    save_file({**load_file(second), name: tensor}, second, metadata={"format": "pt"})
    open_fails(sharded, name, first.name, second.name, "twice")


def test_a_missing_tensor(single):
    path = single / "model.safetensors"
    weights = load_file(path)
    del weights["model.layers.2.mlp.up_proj.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    open_fails(single, "model.layers.2.mlp.up_proj.weight")


def test_a_config_with_another_vocabulary(single):
    edit_json(single / "config.json", vocab_size=65)
    open_fails(single, "model.embed_tokens.weight", "[64, 32]", "[65, 32]")


def test_weights_of_a_type_that_is_not_a_float(single):
    path = single / "model.safetensors"
    weights = load_file(path)
    weights["model.norm.weight"] = weights["model.norm.weight"].to(torch.int8)
    save_file(weights, path, metadata={"format": "pt"})
    open_fails(single, "model.norm.weight", "quantised")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite(single, value):
    path = single / "model.safetensors"
    weights = load_file(path)
    weights["model.layers.1.self_attn.k_proj.weight"][3, 5] = value
    save_file(weights, path, metadata={"format": "pt"})
    checkpoint = DenseCheckpoint.open(str(single))
    checkpoint.load("model.layers.1.self_attn.q_proj.weight")
    with pytest.raises(PhotonError, match="model.safetensors.*layers.1.self_attn.k_proj.weight.*NaN"):
        checkpoint.load("model.layers.1.self_attn.k_proj.weight")


def test_a_changed_file_is_found_by_the_manifest(single):
    write_manifest(single, "dense", {}, {})
    path = single / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    checkpoint = DenseCheckpoint.open(str(single))
    with pytest.raises(PhotonError, match="model.safetensors.*sha256"):
        checkpoint.check_hashes()


def test_a_changed_file_is_found_by_the_name_it_has_in_the_hub_cache(single, tmp_path):
    blob = tmp_path / ("0" * 64)
    shutil.move(single / "model.safetensors", blob)
    (single / "model.safetensors").symlink_to(blob)
    checkpoint = DenseCheckpoint.open(str(single))
    with pytest.raises(PhotonError, match="model.safetensors has a wrong sha256"):
        checkpoint.check_hashes()


def test_a_tokenizer_with_more_tokens_than_embeddings(single):
    content = {"model": {"vocab": {"a": 0, "b": 63}}, "added_tokens": [{"id": 64, "content": "<new>"}]}
    (single / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(PhotonError, match="ids up to 64.*vocab_size=64"):
        DenseCheckpoint.open(str(single)).check_tokenizer()


def test_only_small_files_are_asked_of_the_hub_for_an_estimate(single, monkeypatch):
    import huggingface_hub

    asked = {}

    def download(model, **settings):
        asked.update(settings, model=model)
        (single / "model.safetensors").unlink()
        return str(single)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    checkpoint = DenseCheckpoint.open("someone/model", revision="abc", token="secret", weights=False)
    names = ["config.json", "vocab.json", "additional_chat_templates/tool_use.jinja"]
    others = [
        "original/params.json",
        "onnx/config.json",
        "act/config.json",
        "README.md",
        "model-00001-of-00002.safetensors",
    ]
    patterns = {key: asked[key] for key in ("allow_patterns", "ignore_patterns")}
    assert list(huggingface_hub.utils.filter_repo_objects([*names, *others], **patterns)) == names
    assert (asked["model"], asked["revision"], asked["token"]) == ("someone/model", "abc", "secret")
    assert not any("safetensors" in pattern for pattern in asked["allow_patterns"])
    assert checkpoint.tensors["lm_head.weight"].shape == (64, 32)
