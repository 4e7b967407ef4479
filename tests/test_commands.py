"""`photon-train` finds its commands and says in one line what it cannot do (test_wheel.py runs them installed)."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path

import pytest

from photon_train.commands import __main__ as dispatcher
from photon_train.commands import convert, requires
from photon_train.errors import PhotonError

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
RECIPE_OF = {"convert": "convert_llama"}


def recipe(name: str):
    spec = importlib.util.spec_from_file_location(f"recipe_{name}", RECIPES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_without_a_command_they_are_listed(capsys) -> None:
    dispatcher.run([])
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in dispatcher.COMMANDS)


def test_an_unknown_command_is_one_line() -> None:
    with pytest.raises(PhotonError, match="unknown command 'fine-tune': did you mean 'finetune'"):
        dispatcher.run(["fine-tune", "--model", "x"])
    with pytest.raises(PhotonError, match="unknown command 'xyz': the commands are convert, .*evaluate"):
        dispatcher.run(["xyz"])
    with pytest.raises(PhotonError, match="unknown command '--model'"):
        dispatcher.run(["--model", "x"])


@pytest.mark.parametrize(
    ("name", "required", "options"),
    [
        ("evaluate", ["--long"], ["model", "output", "include-path", "data", "plot"]),
        ("generate", ["--prompt=a"], ["model"]),
        ("serve", [], ["model"]),
    ],
)
def test_the_home_directory_stands_for_a_tilde(name, required, options, monkeypatch, capsys) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    parser = importlib.import_module(f"photon_train.commands.{name}").make_parser()
    found = vars(parser.parse_args([*required, *(f"--{option}=~/x" for option in options)]))
    for option in options:
        value = found[option.replace("-", "_")]
        assert (value[0] if isinstance(value, list) else value) == "/home/someone/x", option
    with pytest.raises(SystemExit):
        parser.parse_args([*required, "--model=~no-such-user/x"])
    assert "this machine has no user 'no-such-user': write ./~no-such-user/x" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "options"), [("generate", ["--prompt=a", "--backend=triton"]), ("serve", [])])
def test_a_dense_model_is_to_be_converted_first(name, options, tmp_path) -> None:
    """Before anything else is found wrong with it."""
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    command = importlib.import_module(f"photon_train.commands.{name}")
    message = (
        rf"{tmp_path} is a llama model and no PHOTON model: .*photon-train convert --model {tmp_path} .*RUN/export"
    )
    with pytest.raises(PhotonError, match=message):
        command.main([f"--model={tmp_path}", *options])


def test_arguments_reach_the_command() -> None:
    with pytest.raises(PhotonError, match="modle"):
        dispatcher.run(["convert", "--modle", "x"])


@pytest.mark.parametrize("name", dispatcher.COMMANDS)
def test_each_command_has_a_recipe_that_runs_it(name: str) -> None:
    stem = name.replace("-", "_")
    module = importlib.import_module(f"photon_train.commands.{stem}")
    found = recipe(RECIPE_OF.get(stem, stem))
    assert found.main.func is module.main and found.main.keywords["prog"].endswith(
        f"recipes/{RECIPE_OF.get(stem, stem)}.py"
    )


def test_there_is_no_recipe_without_a_command() -> None:
    stems = {name.replace("-", "_") for name in dispatcher.COMMANDS}
    assert {path.stem for path in RECIPES.glob("*.py")} == {RECIPE_OF.get(stem, stem) for stem in stems}


def test_without_a_model_the_demos_settings_hold_with_one_the_defaults() -> None:
    demo, plain = convert.read_settings([]), convert.read_settings(["--model", "somewhere"])
    assert demo.train.max_steps < plain.train.max_steps
    assert convert.read_settings(["--train.max_steps", "7"]).train.max_steps == 7


def test_a_package_that_is_missing_is_named_with_its_extra(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(PhotonError, match=r"uvicorn is not installed: pip install 'photon-train\[serve\]'"):
        dispatcher.run(["serve", "--model", "x"])
    with pytest.raises(ModuleNotFoundError, match="photon_train.absent"), requires("serve"):
        importlib.import_module("photon_train.absent")
