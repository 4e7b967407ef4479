"""Bad input to the recipe that generates: one line that names the option, exit status 2."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
from tiny import photon_model
from tiny_tokenizer import word_tokenizer

from photon_train.inference.text import generate_text

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "generate.py"


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("export")
    photon_model("memory").save_pretrained(path)
    word_tokenizer().save_pretrained(path)
    return path


def run(monkeypatch, directory: Path, *options: str) -> int:
    """The recipe's exit status."""
    monkeypatch.setattr(sys, "argv", ["generate.py", "--model", str(directory), "--prompt", "t05", *options])
    with pytest.raises(SystemExit) as exit_:
        runpy.run_path(str(RECIPE), run_name="__main__")
    return exit_.value.code


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--max-new-tokens", "0", "max_new_tokens=0 is not between 1 and"),
        ("--temperature", "-1", "temperature=-1.0 is not between 0.0 and"),
        ("--top-p", "2", "top_p=2.0 must not exceed 1"),
        ("--seed", "-1", "--seed -1 is not between 0 and"),
        ("--dtype", "half-precision", "--dtype 'half-precision' is not auto"),
        ("--device", "tpux", "--device 'tpux' is no device of torch"),
        ("--device", "cuda", "--device cuda: torch finds no GPU here"),
    ],
)
def test_bad_options_get_one_line(option, value, message, directory, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert run(monkeypatch, directory, option, value) == 2
    assert message in capsys.readouterr().err


def test_good_options_generate(directory, monkeypatch, capsys):
    options = ["--max-new-tokens", "2", "--temperature", "1", "--seed", "3", "--device", "cpu", "--dtype", "float32"]
    assert run(monkeypatch, directory, *options) == 0
    assert capsys.readouterr().out.startswith("--- t05\n")


@pytest.mark.parametrize(("positions", "warns"), [(3, False), (2, True)])
def test_what_passes_the_models_positions_is_warned_of(positions, warns, caplog):
    model = photon_model("window", max_position_embeddings=positions)
    generate_text(model, word_tokenizer(), ["t05", "t06"], max_new_tokens=2, do_sample=False)
    message = "2 new tokens reach position 3: the model's positions end at 2"
    assert (message in caplog.text) == warns and ("positions end" in caplog.text) == warns
