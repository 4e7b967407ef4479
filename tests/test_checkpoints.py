"""What is told of a checkpoint without its weights; its configuration is tested where it is used."""

from __future__ import annotations

import pytest
from tiny_checkpoint import byte_tokenizer

from photon_train import checkpoints
from photon_train.checkpoints import read_tokenizer
from photon_train.errors import PhotonError


def test_a_tokenizer_is_read(tmp_path):
    byte_tokenizer().save_pretrained(tmp_path)
    assert len(read_tokenizer(tmp_path)) == 257


def test_without_a_tokenizer_its_files_are_named(tmp_path):
    with pytest.raises(
        PhotonError, match=r"no tokenizer could be read .*: put tokenizer.json and tokenizer_config.json"
    ):
        read_tokenizer(tmp_path)


def test_a_tokenizer_of_sentencepiece_needs_its_package(tmp_path, monkeypatch):
    """transformers would name the package that it tries next."""
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    monkeypatch.setattr(checkpoints, "find_spec", lambda name: None)
    with pytest.raises(PhotonError, match=r"tokenizer.model is read with .* sentencepiece: pip install sentencepiece"):
        read_tokenizer(tmp_path)


def test_a_package_that_is_missing_is_one_line(tmp_path, monkeypatch):
    def read(_):
        raise ImportError("SomeTokenizer requires the X library\nInstall it")

    monkeypatch.setattr(checkpoints.AutoTokenizer, "from_pretrained", read)
    with pytest.raises(PhotonError, match=r"no tokenizer could be read \(SomeTokenizer requires the X library\): put"):
        read_tokenizer(tmp_path)
