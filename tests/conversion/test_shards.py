"""How tensors are divided into files, and how values come into the file of new ones."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from photon_train.conversion.apply import _shards, rewrite_new_tensors
from photon_train.conversion.plan import ConversionPlan, TensorPlan
from photon_train.conversion.safetensors_io import ShardWriter
from photon_train.conversion.source import INDEX
from photon_train.errors import PhotonError


def plan_of(sizes: dict[str, int]) -> ConversionPlan:
    """A plan of fp32 tensors, name -> elements; those in capitals are new."""
    tensors = tuple(
        TensorPlan(name, "copy", "", 0, (size,), () if name.isupper() else ("source",)) for name, size in sizes.items()
    )
    return ConversionPlan("graft", "llama", "float32", True, tensors)


def test_shards_are_filled_to_the_last_byte_and_new_tensors_come_last():
    shards = _shards(plan_of({"a": 10, "N": 3, "b": 10, "c": 21, "d": 5, "e": 14, "f": 2, "M": 1}), max_bytes=80)
    assert [[entry.target for entry in shard] for shard in shards] == [["a", "b"], ["c"], ["d", "e"], ["f"], ["N", "M"]]


@pytest.mark.parametrize(("dtype", "itemsize"), [("float32", 4), ("bfloat16", 2)])
def test_bytes_are_those_of_the_type(dtype, itemsize):
    plan = dataclasses.replace(plan_of({"a": 10, "N": 3}), dtype=dtype)
    assert plan.num_bytes == 13 * itemsize
    assert [len(shard) for shard in _shards(plan, max_bytes=10 * itemsize)] == [1, 1]


def test_rewritten_tensors_keep_their_type_and_the_others_their_values(tmp_path):
    stored = {"new": torch.zeros(3, dtype=torch.bfloat16), "other": torch.full((2,), 7.0)}
    save_file({"old": torch.ones(2)}, tmp_path / "model-00001-of-00002.safetensors")
    save_file(stored, tmp_path / "model-00002-of-00002.safetensors")
    weight_map = {name: "model-00002-of-00002.safetensors" for name in stored}
    index = {"weight_map": {"old": "model-00001-of-00002.safetensors", **weight_map}}
    (tmp_path / INDEX).write_text(json.dumps(index))
    rewrite_new_tensors(tmp_path, {"new": torch.tensor([1.0, 2.0, 3.0], requires_grad=True)})
    found = load_file(tmp_path / "model-00002-of-00002.safetensors")
    assert found["new"].dtype == torch.bfloat16 and found["new"].tolist() == [1, 2, 3]
    assert torch.equal(found["other"], stored["other"])
    with pytest.raises(PhotonError, match="new is not finite in bfloat16"):
        rewrite_new_tensors(tmp_path, {"new": torch.tensor([0.0, torch.finfo(torch.float32).max, 0.0])})
    for name, value in (("new", torch.zeros(2)), ("old", torch.zeros(2)), ("neither", torch.zeros(2))):
        with pytest.raises(PhotonError, match=f"holds no tensor {name} of shape"):
            rewrite_new_tensors(tmp_path, {name: value})


def test_data_starts_on_a_multiple_of_8_bytes_whatever_the_names(tmp_path):
    """The format asks for it."""
    for length in range(1, 9):
        path = tmp_path / f"{length}.safetensors"
        with ShardWriter(path, {"a" * length: (2,)}, torch.float32) as writer:
            writer.write("a" * length, [torch.ones(2)])
        assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0
        assert load_file(path)["a" * length].tolist() == [1, 1]
