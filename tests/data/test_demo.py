"""The demo's dense model, at a size that trains in a second."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from photon_train.config import DataSettings
from photon_train.data import demo, pretrain
from photon_train.data.corpora import read_documents, split_documents
from photon_train.data.demo import default_cache_dir, demo_dense_model
from photon_train.data.packing import pack
from photon_train.data.pretrain import PretrainSettings
from photon_train.data.tokenizers import check_tokenizer
from photon_train.errors import PhotonError
from photon_train.evaluation.perplexity import evaluate_loss

TINY = PretrainSettings(
    vocab_size=320,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    intermediate_size=64,
    seq_len=32,
    batch_size=4,
    steps=40,
    learning_rate=1e-2,
    warmup_steps=4,
)


@pytest.fixture(autouse=True)
def _small_corpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first files of the standard library only."""
    monkeypatch.setattr(demo, "read_documents", lambda *_: read_documents(None, DataSettings(max_documents=12)))


@pytest.fixture
def built(tmp_path: Path) -> Path:
    return demo_dense_model(tmp_path, progress=False, settings=TINY)


def test_it_trains_and_loads_with_the_auto_classes(built: Path) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(built), AutoTokenizer.from_pretrained(built)
    assert model.config.model_type == "llama" and model.dtype == torch.float32
    check_tokenizer(tokenizer, model.config.vocab_size)
    assert tokenizer.eos_token_id == model.generation_config.eos_token_id == model.config.eos_token_id
    text = "class A:\n    def grüße(self): 🎈\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert not list(built.glob("*.bin")) and (built / "model.safetensors").is_file()

    _, held_out = split_documents(demo.read_documents(), TINY.held_out_fraction)
    dataset = pack(held_out, tokenizer, 32, 1, tokenizer.eos_token_id, progress=False)
    torch.manual_seed(0)
    untrained = type(model)(model.config)
    assert evaluate_loss(model, dataset, 4).ce < evaluate_loss(untrained, dataset, 4).ce - 1.0


def test_second_call_finds_the_cached_model(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("pretrained again")

    monkeypatch.setattr(demo, "pretrain", fail)
    assert demo_dense_model(tmp_path, progress=False, settings=TINY) == built
    with pytest.raises(AssertionError, match="pretrained again"):
        demo_dense_model(tmp_path, progress=False, settings=dataclasses.replace(TINY, seed=1))


def test_the_same_recipe_gives_the_same_weights(built: Path, tmp_path: Path) -> None:
    torch.manual_seed(99)  # the global generator must not matter
    again = demo_dense_model(tmp_path / "again", progress=False, settings=TINY)
    assert again.name == built.name
    first, second = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (built, again))
    for name, weight in first.items():
        torch.testing.assert_close(second[name], weight, rtol=0, atol=1e-4)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_killed_run_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type) -> None:
    calls = iter(range(100))

    def killed(*_: int) -> float:
        if next(calls) == 5:
            raise error
        return 1.0

    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "_rate", killed)
        with pytest.raises(error):
            demo_dense_model(tmp_path, progress=False, settings=TINY)
    assert list(tmp_path.iterdir()) == []
    assert demo_dense_model(tmp_path, progress=False, settings=TINY).is_dir()


def test_cache_that_cannot_be_written_is_told_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "pretrain", None)
    (tmp_path / "file").write_text("")
    with pytest.raises(PhotonError, match="cannot be written.*PHOTON_TRAIN_CACHE"):
        demo_dense_model(tmp_path / "file" / "cache", progress=False, settings=TINY)


def test_cache_directory_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHOTON_TRAIN_CACHE", "/one")
    monkeypatch.setenv("XDG_CACHE_HOME", "/two")
    assert default_cache_dir() == Path("/one")
    monkeypatch.delenv("PHOTON_TRAIN_CACHE")
    assert default_cache_dir() == Path("/two/photon-train")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache_dir() == Path.home() / ".cache" / "photon-train"


def test_bf16_only_where_it_is_native(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    for capabilities, expected in (({"avx2": True}, torch.float32), ({"amx_bf16": True}, torch.bfloat16)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=capabilities: found, raising=False)
        assert pretrain.fast_dtype(cpu) == expected
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert pretrain.fast_dtype(cpu) == torch.float32
    assert pretrain.fast_dtype(torch.device("cuda")) == torch.bfloat16


def test_default_recipe_has_about_five_million_parameters() -> None:
    with torch.device("meta"):
        model = pretrain.LlamaForCausalLM(PretrainSettings().model_config(0))
    assert 4.5e6 < model.num_parameters() < 6e6


def test_recipe_is_longer_where_bf16_is_native(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = {}
    for dtype in (torch.float32, torch.bfloat16):
        monkeypatch.setattr(pretrain, "fast_dtype", lambda device, dtype=dtype: dtype)
        steps[dtype] = PretrainSettings.for_machine().steps
    assert steps[torch.float32] == PretrainSettings().steps < steps[torch.bfloat16]
