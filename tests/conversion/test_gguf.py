"""A GGUF file is the model it was written from; what cannot be read is one line, before any weight is."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch
from tiny_gguf import CHAT_TEMPLATE, gemma_model, gguf_model, rounded, write_gguf
from transformers import AutoModelForCausalLM, AutoTokenizer

from photon_train.conversion import gguf as subject
from photon_train.conversion.families import FAMILIES
from photon_train.conversion.gguf import cached_checkpoint, dequantise
from photon_train.conversion.source import DenseCheckpoint
from photon_train.errors import PhotonError

TOKENS = torch.arange(200).view(2, 100)


def refuses(path, *words: str) -> None:
    with pytest.raises(PhotonError) as error:
        DenseCheckpoint.open(str(path))
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("tied", [True, False])
def test_a_file_of_floats_is_the_model_itself(tmp_path, tied):
    """Including the order of the dimensions of queries and keys, which GGUF interleaves."""
    model = gguf_model(tie_word_embeddings=tied)
    checkpoint = DenseCheckpoint.open(str(write_gguf(tmp_path / "tiny.gguf", model)))
    checkpoint.check_tokenizer()
    read = AutoModelForCausalLM.from_pretrained(checkpoint.directory)
    assert checkpoint.dtype == torch.float32
    assert torch.equal(read(TOKENS).logits, model(TOKENS).logits)
    assert (read.config.rms_norm_eps, read.config.max_position_embeddings) == (1e-5, 512)
    assert read.generation_config.eos_token_id == 0
    assert "quantization_config" not in (checkpoint.directory / "config.json").read_text()


def test_a_file_of_gemma_is_the_model_itself(tmp_path):
    """Its norms are stored with one added."""
    model = gemma_model()
    checkpoint = DenseCheckpoint.open(str(write_gguf(tmp_path / "tiny.gguf", model, architecture="gemma3")))
    assert checkpoint.config.layer_types == model.config.layer_types
    read = AutoModelForCausalLM.from_pretrained(checkpoint.directory)
    torch.testing.assert_close(read(TOKENS).logits, model(TOKENS).logits, atol=1e-4, rtol=1e-4)


def test_a_part_of_several_is_refused(tmp_path):
    file = write_gguf(tmp_path / "tiny.gguf", gguf_model(), fields={"split.count": 2})
    refuses(file, "tiny.gguf is one of 2 parts", "llama-gguf-split --merge")


def test_a_scale_that_no_file_says_is_refused(tmp_path):
    file = write_gguf(tmp_path / "tiny.gguf", gguf_model(num_hidden_layers=46), architecture="gemma2")
    refuses(file, "tiny.gguf", "query_pre_attn_scalar", "safetensors")


def test_hybrids_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(subject, "family_of", lambda config: FAMILIES["lfm2"])
    refuses(write_gguf(tmp_path / "tiny.gguf", gguf_model()), "hybrids (lfm2)", "safetensors")


@pytest.mark.parametrize(("quantisation", "dtype"), [("F16", torch.float16), ("Q8_0", torch.bfloat16)])
def test_what_most_weights_are_stored_in_decides_the_type(tmp_path, quantisation, dtype):
    model = gguf_model()
    checkpoint = DenseCheckpoint.open(str(write_gguf(tmp_path / "tiny.gguf", model, quantisation)))
    name = "model.layers.1.mlp.up_proj.weight"
    stored = torch.from_numpy(rounded(model.get_parameter(name).detach().numpy(), quantisation))
    assert checkpoint.dtype == dtype
    assert torch.equal(checkpoint.load(name), stored.to(dtype))
    assert not torch.equal(stored, model.get_parameter(name))


def test_the_tokenizer_splits_digits_where_the_file_says_so(tmp_path):
    """ "a  1": GPT-2 leaves the second space to the digit, SmolLM's splitting keeps both together."""
    tokenizer = AutoTokenizer.from_pretrained(cached_checkpoint(write_gguf(tmp_path / "tiny.gguf", gguf_model())))
    assert [piece for piece, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("a  12")] == [
        *("a", "ĠĠ", "1", "2")
    ]
    text = "the the 12 naïve <|end|>"
    tokens = tokenizer(text).input_ids
    assert tokenizer.decode(tokens) == text
    assert tokenizer.convert_ids_to_tokens(tokens)[:2] == ["the", "Ġthe"]
    assert tokens[-1] == tokenizer.eos_token_id == 0
    assert tokenizer.chat_template == CHAT_TEMPLATE
    assert tokenizer.model_max_length == 512
    assert len(tokenizer) == 261  # GPT-2's class would add its own end of text, for which there is no embedding


def test_a_directory_with_one_file_is_that_file(tmp_path):
    file = write_gguf(tmp_path / "tiny.gguf", gguf_model())
    found = DenseCheckpoint.open(str(tmp_path))
    assert found.directory == DenseCheckpoint.open(str(file)).directory != tmp_path
    file.with_name("other.gguf").write_bytes(file.read_bytes())
    refuses(tmp_path, "2 GGUF files", "name one")


def test_an_adapter_beside_the_file_is_not_ignored(tmp_path):
    file = write_gguf(tmp_path / "tiny.gguf", gguf_model())
    cached_checkpoint(file)
    (tmp_path / "adapter_config.json").write_text("{}")
    refuses(file, "adapter_config.json", "beside the model", "merge_and_unload")


def test_a_padding_token_without_a_row_is_refused_before_any_weight_is_read(tmp_path, monkeypatch):
    file = write_gguf(tmp_path / "tiny.gguf", gguf_model())
    read = subject.AutoConfig.from_pretrained

    def changed(*args, **settings):
        config = read(*args, **settings)
        config.pad_token_id = 9999
        return config

    monkeypatch.setattr(subject.AutoConfig, "from_pretrained", changed)
    monkeypatch.setattr(subject, "_load", lambda *_: pytest.fail("the weights were read"))
    refuses(file, "tiny.gguf: pad_token_id=9999 has no row in the embedding")


def test_it_is_dequantised_once_and_again_when_it_changes(tmp_path, monkeypatch):
    file = write_gguf(tmp_path / "tiny.gguf", gguf_model())
    calls = []
    monkeypatch.setattr(subject, "dequantise", lambda *a: calls.append(a) or dequantise(*a))
    first = cached_checkpoint(file)
    assert cached_checkpoint(file) == first
    assert len(calls) == 1
    os.utime(file, ns=(1, 1))
    assert cached_checkpoint(file) != first
    assert len(calls) == 2


def test_a_plan_reads_no_weights(tmp_path):
    file = write_gguf(tmp_path / "tiny.gguf", gguf_model())
    plan = DenseCheckpoint.open(str(file), weights=False)
    assert not list(plan.directory.glob("*.safetensors"))
    whole = DenseCheckpoint.open(str(file))
    assert plan.directory != whole.directory
    assert {n: i.shape for n, i in plan.tensors.items()} == {n: i.shape for n, i in whole.tensors.items()}
    assert plan.dtype == whole.dtype
    assert DenseCheckpoint.open(str(file), weights=False).directory == whole.directory


def test_a_tokenizer_beside_the_file_is_preferred(tmp_path):
    file = write_gguf(tmp_path / "tiny.gguf", gguf_model(), splitting="unheard-of")
    refuses(file, "unheard-of", "tokenizer.json")
    other = tmp_path / "other"
    other.mkdir()
    AutoTokenizer.from_pretrained(cached_checkpoint(write_gguf(other / "b.gguf", gguf_model()))).save_pretrained(
        tmp_path
    )
    assert DenseCheckpoint.open(str(file)).config.vocab_size == 261


def test_the_package_is_named_where_it_is_missing(tmp_path, monkeypatch):
    file = write_gguf(tmp_path / "tiny.gguf", gguf_model())
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gguf" else find_spec(name))
    refuses(file, "tiny.gguf", "pip install 'photon-train[gguf]'")


def test_damaged_files_are_refused(tmp_path):
    file = write_gguf(tmp_path / "tiny.gguf", gguf_model())
    content = file.read_bytes()
    for broken in (content[: len(content) // 2], content[:200], b"GGML" + content[4:], b""):
        file.write_bytes(broken)
        refuses(file, "tiny.gguf", "download it again")
    write_gguf(file, gguf_model(), leave_out="blk.1.ffn_up.weight")
    refuses(file, "model.layers.1.mlp.up_proj.weight")


def test_an_unknown_quantisation_is_refused(tmp_path, monkeypatch):
    """One that the file's reader does not know, and one that it knows and nobody can dequantise."""
    import gguf

    file = write_gguf(tmp_path / "tiny.gguf", gguf_model(), "Q8_0")
    content = file.read_bytes()
    entry = content.index(b"blk.0.attn_q.weight") + len(b"blk.0.attn_q.weight") + 4 + 2 * 8
    assert content[entry] == gguf.GGMLQuantizationType.Q8_0
    file.write_bytes(content[:entry] + bytes([200]) + content[entry + 1 :])
    refuses(file, "unknown quantisation", "200")
    file.write_bytes(content)

    def fails(*_):
        raise NotImplementedError

    monkeypatch.setattr(gguf.quants, "dequantize", fails)
    os.utime(file, ns=(1, 1))
    refuses(file, "quantisation Q8_0", "cannot")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architecture": "gptx"}, ("gptx", "safetensors")),
        ({"architecture": "gpt2"}, ("gpt2",)),
        ({"fields": {"llama.rope.scaling.type": "yarn"}}, ("rotation", "yarn")),
    ],
)
def test_what_would_be_another_model_is_refused(tmp_path, changes, words):
    refuses(write_gguf(tmp_path / "tiny.gguf", gguf_model(), **changes), "tiny.gguf", *words)
