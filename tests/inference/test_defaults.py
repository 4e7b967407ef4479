"""generation_config.json: one rule for the command that generates, the engine and the server."""

from __future__ import annotations

import pytest
from tiny import photon_model
from tiny_tokenizer import word_tokenizer
from transformers import GenerationConfig

from photon_train.commands import generate
from photon_train.errors import PhotonError
from photon_train.inference.defaults import sampling_defaults
from photon_train.inference.engine import Engine, EngineSettings
from photon_train.inference.openai import CompletionRequest
from photon_train.inference.request import SamplingParams

FILE = {"repetition_penalty": 5.0, "num_beams": 4, "no_repeat_ngram_size": 2, "eos_token_id": 1}


@pytest.fixture
def directory(tmp_path):
    def save(**settings):
        model = photon_model("memory")
        model.generation_config = GenerationConfig(**settings)
        model.save_pretrained(tmp_path)
        word_tokenizer().save_pretrained(tmp_path)
        return str(tmp_path)

    return save


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {}),
        ({"num_beams": 1, "top_p": 1.0, "repetition_penalty": 1.0, "do_sample": False}, {}),
        ({"temperature": 0.6, "top_k": 20}, {"temperature": 0.6, "top_k": 20}),
        ({"do_sample": True, "top_p": 0.9}, {"temperature": 1.0, "top_p": 0.9}),
        ({"do_sample": False, "temperature": 0.6, "repetition_penalty": 1.2}, {"repetition_penalty": 1.2}),
        ({"stop_strings": "end", "max_length": 20}, {"stop": ("end",)}),
    ],
)
def test_what_a_file_gives(settings, expected, caplog):
    assert sampling_defaults(GenerationConfig(**settings)) == expected
    assert sampling_defaults(GenerationConfig(**settings), "ignore") == {}
    assert "not done here" not in caplog.text and ("gives" in caplog.text) == bool(expected)


def test_what_cannot_be_done_is_said(caplog):
    assert sampling_defaults(GenerationConfig(**FILE, stop_strings=["x"]), with_text=False) == {
        "repetition_penalty": 5.0
    }
    message = "asks for no_repeat_ngram_size=2, num_beams=4, stop_strings=['x'], which is not done here"
    assert message in caplog.text


@pytest.mark.parametrize("settings", [{"top_p": 3.0}, {"temperature": "hot"}])
def test_a_wrong_value_names_the_file(settings):
    config = GenerationConfig()
    config.update(**settings)
    with pytest.raises(PhotonError, match="generation_config.json: .*: correct it, or ignore it"):
        sampling_defaults(config)
    with pytest.raises(PhotonError, match="generation_config='other' is not auto or ignore"):
        sampling_defaults(GenerationConfig(), "other")


def test_the_command_and_the_engine_agree(directory, capsys):
    path, model = directory(**FILE, stop_strings=["t59"]), photon_model("memory")
    model.generation_config = GenerationConfig(**FILE, stop_strings=["t59"])
    texts = {}
    for mode in ("auto", "ignore"):
        options = ["--model", path, "--prompt", "t05 t06", "--max-new-tokens", "12", "--generation-config", mode]
        generate.main([*options, "--device", "cpu"])
        texts[mode] = capsys.readouterr().out.split("--- t05 t06\n")[1].split("\n")[0].strip()
        engine = Engine(model, word_tokenizer(), EngineSettings(max_length=64, generation_config=mode))
        params = SamplingParams(max_new_tokens=12, **engine.defaults)
        assert engine.generate(["t05 t06"], params)[0][0].text.strip() == texts[mode]
    assert texts == {"auto": "t43 t41 t34 t39 t16", "ignore": " ".join(["t43"] * 12)}
    # With no settings at all they are the engine's, too.
    engine = Engine(model, word_tokenizer(), EngineSettings(max_length=256))
    engine.add("t05")
    assert engine.scheduler.waiting[0].params == SamplingParams(repetition_penalty=5.0, stop=("t59",))


def test_who_asks_for_a_value_gets_it():
    defaults = {"temperature": 0.6, "repetition_penalty": 1.2, "stop": ("end",)}
    params = CompletionRequest(prompt=[5], temperature=0, stop="t05").sampling(3, 1, 0, defaults)
    assert (params.temperature, params.repetition_penalty, params.stop) == (0.0, 1.2, ("t05",))
    params = CompletionRequest(prompt=[5]).sampling(3, 1, 0, defaults)
    assert (params.temperature, params.stop) == (0.6, ("end",))
    assert CompletionRequest(prompt=[5]).sampling(3, 1, 0, {}).temperature == 1.0


def test_the_command_samples_from_all_tokens(directory, monkeypatch):
    """transformers' own default, 50 tokens, is nobody's wish."""
    seen = {}
    monkeypatch.setattr(
        "photon_train.inference.text.generate_text", lambda *_, **settings: seen.update(settings) or ["text"]
    )
    generate.main(["--model", directory(), "--prompt", "t05", "--temperature", "0.5", "--device", "cpu"])
    assert seen["do_sample"] and seen["top_k"] == 0 and seen["temperature"] == 0.5
