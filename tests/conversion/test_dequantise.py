"""Quantised weights are the numbers that their format's definition gives, and a checkpoint of them an ordinary one."""

from __future__ import annotations

import json
import os
from pathlib import Path

import golden_bitsandbytes
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_dense import save_dense
from tiny_quantised import KINDS, save_quantised
from transformers import AutoModelForCausalLM

from photon_train.config import RunConfig
from photon_train.conversion.apply import convert
from photon_train.conversion.dequantise import checkpoint as subject
from photon_train.conversion.dequantise.bitsandbytes import Bits4, Bits8
from photon_train.conversion.dequantise.methods import format_of
from photon_train.conversion.presets import make_plan, photon_config
from photon_train.conversion.safetensors_io import TensorInfo
from photon_train.conversion.source import DenseCheckpoint, loadable
from photon_train.pipeline.prepare import plan_conversion, show_conversion

GOLDEN = json.loads(Path(__file__).with_name("golden_bitsandbytes.json").read_text())
# Rows and columns: whole blocks, blocks of which the last are not full, less than a block, and odd numbers of values.
SHAPES = [(32, 96), (52, 40), (5, 7), (1, 33), (33, 1)]


def weights_of(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def dequantised(settings: dict, stored: dict[str, torch.Tensor], shape: tuple[int, ...]) -> torch.Tensor:
    form = format_of(settings)
    headers = {f"a.{end}": TensorInfo(tuple(each.shape), each.dtype, None) for end, each in stored.items()}
    parts = form.parts("a.weight", shape, headers)
    assert set(parts.values()) == set(headers)
    return form.dequantise({role: stored[name.removeprefix("a.")].clone() for role, name in parts.items()}, shape)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_what_the_definition_gives(kind, shape):
    quantise, settings = KINDS[kind]
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 1, shape[0])[:, None]
    stored, exact = quantise(weight)
    found = dequantised(settings, stored, shape)
    assert found.dtype == torch.float32 and found.shape == shape
    # Factors that are sums (of a quantised part and an offset) cancel.
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=1e-8 * float(exact.abs().max()))
    assert (exact - weight).abs().max() < 0.3 * weight.abs().max()  # the test's own quantiser is none that is broken


def test_factors_of_factors_have_blocks_of_their_own():
    """265 blocks, whose factors are two blocks, the second not full."""
    weight = torch.randn(129, 131, generator=torch.Generator().manual_seed(1))
    weight[100:] *= 30
    stored, exact = KINDS["bitsandbytes 4 nested"][0](weight)
    assert stored["weight.nested_absmax"].shape == (2,)
    found = dequantised({"load_in_4bit": True}, stored, (129, 131))
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=1e-6)


def test_powers_of_two_and_vectors_may_be_factors():
    """E8M0 scales, scales without the dimension of one, and 4-bit values saved as another type."""
    weight = torch.tensor([[1.0, -2.0, 448.0], [0.5, 16.0, 3.0]]).to(torch.float8_e4m3fn)
    scale = torch.tensor([0.25, 8.0]).to(torch.float8_e8m0fnu)
    found = dequantised({"quant_method": "fp8"}, {"weight": weight, "weight_scale_inv": scale}, (2, 3))
    assert found.tolist() == [[0.25, -0.5, 112.0], [4.0, 128.0, 24.0]]
    stored, exact = KINDS["bitsandbytes 4"][0](torch.randn(6, 10))
    stored["weight"] = stored["weight"].flatten().view(torch.bfloat16)[:, None]
    torch.testing.assert_close(dequantised({"load_in_4bit": True}, stored, (6, 10)).double(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", GOLDEN)
def test_bitsandbytes_gives_the_same_numbers(kind):
    """Recorded from the package (see `golden_bitsandbytes`)."""
    tensors = {
        name: torch.tensor(each["values"], dtype=getattr(torch, each["dtype"])).view(each["shape"])
        for name, each in GOLDEN[kind].items()
    }
    expected = tensors.pop("result")
    found = (Bits8() if kind == "int8" else Bits4()).dequantise(tensors, tuple(expected.shape))
    torch.testing.assert_close(found, expected, rtol=2e-7, atol=0)
    assert expected.abs().max() > 0.1


@pytest.mark.parametrize("kind", golden_bitsandbytes.SHAPES)
def test_bitsandbytes_where_it_is_installed(kind):
    pytest.importorskip("bitsandbytes")
    tensors, expected = golden_bitsandbytes.stored(kind)
    found = (Bits8() if kind == "int8" else Bits4()).dequantise(tensors, tuple(expected.shape))
    torch.testing.assert_close(found, expected.float(), rtol=2e-7, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_is_its_dequantised_copy(tmp_path, kind):
    """To the bit, in every tensor, and as transformers reads it."""
    directory = save_quantised(tmp_path / "model", kind)
    found = DenseCheckpoint.open(str(directory))
    copy = weights_of(tmp_path / "copy")
    assert found.directory != directory and found.dtype == torch.bfloat16
    assert set(found.tensors) == set(copy)
    for name, tensor in copy.items():
        assert torch.equal(found.load(name), tensor), name
    assert "quant" not in (found.directory / "config.json").read_text()
    tokens = torch.arange(20)[None]
    read, expected = (AutoModelForCausalLM.from_pretrained(path) for path in (found.directory, tmp_path / "copy"))
    assert torch.equal(read(tokens).logits, expected(tokens).logits)
    assert loadable(str(directory)) == found.directory
    assert loadable(str(tmp_path / "copy")) == str(tmp_path / "copy")


@pytest.mark.parametrize("model_type", ["llama", "phi3"])
def test_a_conversion_is_that_of_the_copy(tmp_path, model_type):
    directory = save_quantised(tmp_path / "model", "fp8 blocks", model_type)
    for source, output in ((directory, "a"), (tmp_path / "copy", "b")):
        checkpoint = DenseCheckpoint.open(str(source))
        config = photon_config(checkpoint.config, RunConfig())
        convert(checkpoint, make_plan(checkpoint, config), config, tmp_path / output, progress=False)
    found, expected = weights_of(tmp_path / "a"), weights_of(tmp_path / "b")
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert (tmp_path / "a" / "config.json").read_text() == (tmp_path / "b" / "config.json").read_text()


def test_stacked_experts_are_turned_round(tmp_path):
    """As transformers reads them: of gpt-oss, whose matrices are square, nothing else would show it."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_local_experts": 3}
    copy = save_dense(tmp_path / "copy", "gpt_oss", **sizes, layer_types=["sliding_attention", "full_attention"])
    directory, weights = tmp_path / "model", load_file(copy / "model.safetensors")
    stored = {name: weight.bfloat16() for name, weight in weights.items() if not name.endswith("_proj")}
    expected = dict(stored)
    for name in sorted(set(weights) - set(stored)):
        parts = [KINDS["mxfp4"][0](expert.T.contiguous())[0] for expert in weights[name]]
        for kind in ("blocks", "scales"):
            stored[f"{name}_{kind}"] = torch.stack([part[f"weight_{kind}"] for part in parts])
        expected[name] = convert_moe_packed_tensors(stored[f"{name}_blocks"], stored[f"{name}_scales"])
        assert (expected[name] - weights[name]).norm() < 0.2 * weights[name].norm()
    directory.mkdir()
    save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((copy / "config.json").read_text())
    settings = {"dtype": "bfloat16", "quantization_config": KINDS["mxfp4"][1]}
    (directory / "config.json").write_text(json.dumps(config | settings))
    found = DenseCheckpoint.open(str(directory))
    assert set(found.tensors) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(found.load(name), tensor), name


def test_small_files_come_along(tmp_path):
    directory = save_quantised(tmp_path / "model", "fp8 rows")
    (directory / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}}')
    (directory / "generation_config.json").write_text('{"eos_token_id": 7}')
    found = DenseCheckpoint.open(str(directory)).directory
    assert (found / "tokenizer.json").read_text() == (directory / "tokenizer.json").read_text()
    assert json.loads((found / "generation_config.json").read_text()) == {"eos_token_id": 7}


def test_a_tied_head_that_is_stored_is_kept_for_the_comparison(tmp_path):
    directory = save_quantised(tmp_path / "model", "fp8 rows", tie_word_embeddings=True)
    assert "lm_head.weight" not in DenseCheckpoint.open(str(directory)).tensors
    other = save_quantised(tmp_path / "other", "fp8 rows")
    content = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(content | {"tie_word_embeddings": True}))
    assert "lm_head.weight" in DenseCheckpoint.open(str(other)).tensors


@pytest.mark.parametrize(
    ("named", "dtype"), [("float16", torch.float16), ("float64", torch.bfloat16), (None, torch.bfloat16)]
)
def test_the_model_names_the_type(tmp_path, named, dtype):
    directory = save_quantised(tmp_path / "model", "bitsandbytes 8")
    content = json.loads((directory / "config.json").read_text())
    content.pop("dtype")
    (directory / "config.json").write_text(json.dumps(content | ({"torch_dtype": named} if named else {})))
    assert DenseCheckpoint.open(str(directory), weights=False).dtype == dtype
    found = DenseCheckpoint.open(str(directory))
    assert {info.dtype for info in found.tensors.values()} == {dtype}
    assert found.config.dtype == dtype


def test_weights_are_divided_into_files(tmp_path, monkeypatch):
    monkeypatch.setattr(subject, "_SHARD_BYTES", 8000)
    found = DenseCheckpoint.open(str(save_quantised(tmp_path / "model", "fp8 rows")))
    assert len(found.files) > 3
    copy = weights_of(tmp_path / "copy")
    assert all(torch.equal(found.load(name), tensor) for name, tensor in copy.items())
    assert max(file.stat().st_size for file in found.files) < 8000 + 2000


def test_one_weight_at_a_time_is_in_memory(tmp_path, monkeypatch):
    """Each is read when the one before is written."""
    order = []
    read, write = subject._whole, subject.ShardWriter.write
    monkeypatch.setattr(subject, "_whole", lambda info: order.append("read") or read(info))
    monkeypatch.setattr(subject.ShardWriter, "write", lambda *a: write(*a) or order.append("written"))
    DenseCheckpoint.open(str(save_quantised(tmp_path / "model", "fp8 rows")))
    assert "read read read" not in " ".join(order)  # two parts each
    assert order.count("read") == 2 * 14


def test_it_is_dequantised_once_and_again_when_it_changes(tmp_path):
    directory = save_quantised(tmp_path / "model", "mxfp4")
    first = DenseCheckpoint.open(str(directory)).directory
    written = (first / "config.json").stat().st_mtime_ns
    assert DenseCheckpoint.open(str(directory)).directory == first
    assert (first / "config.json").stat().st_mtime_ns == written
    os.utime(directory / "model.safetensors", ns=(1, 1))
    assert DenseCheckpoint.open(str(directory)).directory != first


def test_a_plan_says_what_is_dequantised_and_writes_nothing(tmp_path, capsys):
    directory = save_quantised(tmp_path / "model", "fp8 blocks")
    stored = weights_of(directory)
    before = sum(tensor.numel() * tensor.element_size() for tensor in stored.values()) / 1e6
    after = sum(tensor.numel() * 2 for tensor in weights_of(tmp_path / "copy").values()) / 1e6
    cache = Path(os.environ["XDG_CACHE_HOME"])
    planned = DenseCheckpoint.open(str(directory), weights=False)
    assert not any(cache.iterdir())
    opened = DenseCheckpoint.open(str(directory))
    assert str(planned.quantised) == str(opened.quantised)
    assert not hasattr(planned.config, "quantization_config")
    assert {n: (i.shape, i.dtype) for n, i in planned.tensors.items()} == {
        n: (i.shape, i.dtype) for n, i in opened.tensors.items()
    }
    show_conversion(plan_conversion(planned, RunConfig(), 1))
    text = " ".join(capsys.readouterr().out.split())
    assert (
        f"FP8 in blocks of 16x24, 14 of 21 tensors, {before:.2f} MB. It is dequantised to bfloat16, {after:.2f} MB"
        in text
    )
    (directory / "model.safetensors").unlink()
    unknown = str(DenseCheckpoint.open(str(directory), weights=False).quantised)
    assert f"FP8 in blocks of 16x24. It is dequantised to bfloat16, {after:.2f} MB, once it is downloaded" in unknown
    assert DenseCheckpoint.open(str(tmp_path / "copy")).quantised is None
