"""Loading of the configuration: precedence, strictness, help, round trip."""

from __future__ import annotations

import dataclasses
import errno
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from photon_train import cli
from photon_train.cli_help import field_docs
from photon_train.config import LevelOverrides, RunConfig, SourceSettings
from photon_train.config_values import all_keys, field_types, merge
from photon_train.config_yaml import parse_yaml
from photon_train.errors import PhotonError


def load(*argv: str, defaults: RunConfig | None = None) -> RunConfig:
    return cli.load_config(list(argv), prog="recipe.py", description="A recipe.", defaults=defaults)


@pytest.fixture
def yaml_file(tmp_path: Path):
    def write(text: str) -> str:
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return str(path)

    return write


def test_without_arguments_the_defaults() -> None:
    assert load() == RunConfig()


def test_precedence_and_place_of_config_on_the_line(yaml_file) -> None:
    path = yaml_file("train: {max_steps: 7, seq_len: 64}\nseed: 5\n")
    defaults = RunConfig(seed=1, preset="split")
    before = load("--config", path, "--train.max_steps", "200", defaults=defaults)
    after = load("--train.max_steps=200", f"--config={path}", defaults=defaults)
    assert before == after
    assert (after.train.max_steps, after.train.seq_len, after.seed, after.preset) == (200, 64, 5, "split")
    assert defaults == RunConfig(seed=1, preset="split"), "the defaults are not written to"


def test_flags() -> None:
    assert load("--dry-run", "--resume", "--seed", "3") == RunConfig(dry_run=True, resume=True, seed=3)
    assert load("--seed", "3", "--dry_run").dry_run
    assert load("--train.dense_baseline", "false").train.dense_baseline is False


def test_level_overrides_extend_the_list(yaml_file) -> None:
    config = load("--photon.levels.1.chunk_size", "8", "--photon.levels.0.num_slots", "2")
    assert config.photon.levels == [LevelOverrides(num_slots=2), LevelOverrides(chunk_size=8)]
    path = yaml_file("photon: {levels: [{chunk_size: 2, encoder_layers: 1}, {chunk_size: 3}]}")
    config = load("--config", path, "--photon.levels.0.chunk_size", "4")
    assert config.photon.levels == [LevelOverrides(chunk_size=4, encoder_layers=1), LevelOverrides(chunk_size=3)]


@pytest.mark.parametrize("text", ["[0,2]", "0,2", "[0, 2]"])
def test_lists(text: str) -> None:
    assert load("--photon.memory_layers", text).photon.memory_layers == [0, 2]


def test_lists_of_text_empty_and_unset() -> None:
    config = load("--lora.target_modules", "q_proj,v_proj", "--photon.memory_layers", "[]")
    assert config.lora.target_modules == ["q_proj", "v_proj"]
    assert config.photon.memory_layers == []
    assert load("--photon.memory_layers", "none").photon.memory_layers is None


def test_text_stays_text() -> None:
    config = load("--hub.revision", "0123", "--tracking.tracker", "none", "--train.mixed_precision", "no")
    assert (config.hub.revision, config.tracking.tracker, config.train.mixed_precision) == ("0123", "none", "no")
    assert load("--model", "none").model is None


def test_numbers_in_yaml_are_read_as_people_write_them(yaml_file) -> None:
    config = load("--config", yaml_file("train: {learning_rate: 1e-4, max_steps: 1e3, mixed_precision: no}"))
    assert config.train.learning_rate == 1e-4
    assert config.train.max_steps == 1000 and isinstance(config.train.max_steps, int)
    assert config.train.mixed_precision == "no"
    assert load("--train.learning_rate", "1e-4").train.learning_rate == 1e-4
    assert isinstance(load("--train.learning_rate", "1").train.learning_rate, float)


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--train.max_step", "3"], ["train.max_step", "command line", "train.max_steps"]),
        (["--max_steps", "3"], ["max_steps", "did you mean 'train.max_steps'"]),
        (["--photon.levels.0.chunk", "3"], ["photon.levels.0.chunk", "photon.levels.0.chunk_size"]),
        (["--photon.levels.99.chunk_size", "3"], ["photon.levels.99.chunk_size", "at most"]),
        (["--photon.levels.x.chunk_size", "3"], ["photon.levels.x.chunk_size", "photon.levels.0.chunk_size"]),
        (["--xyzzy", "3"], ["xyzzy", "--help"]),
        (["--train", "3"], ["--train", "group"]),
        (["--train.max_steps"], ["--train.max_steps", "value"]),
        (["--train.max_steps", "--resume"], ["--train.max_steps", "value"]),
        (["200"], ["'200'", "--key value"]),
        (["--train.max_steps", "many"], ["train.max_steps", "'many'", "whole number"]),
        (["--train.max_steps", "1.5"], ["train.max_steps", "'1.5'", "whole number"]),
        (["--train.learning_rate", "nan"], ["train.learning_rate", "nan", "finite"]),
        (["--train.dense_baseline", "maybe"], ["train.dense_baseline", "'maybe'", "true or false"]),
        (["--photon.memory_layers", "a,b"], ["photon.memory_layers.0", "'a'", "whole number"]),
        (["--photon.memory_layers", "[0"], ["command line", "not valid YAML"]),
        (["--seed", "none"], ["seed", "'none'", "whole number"]),
        (["--config", "absent.yaml"], ["absent.yaml", "No such file"]),
    ],
)
def test_bad_command_line_is_one_clear_error(argv: list[str], parts: list[str]) -> None:
    with pytest.raises(PhotonError) as error:
        load(*argv)
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("train: {max_stepz: 3}", ["train.max_stepz", "run.yaml", "train.max_steps"]),
        ("trian: {max_steps: 3}", ["trian", "run.yaml", "did you mean"]),
        ("train: 3", ["train", "run.yaml", "mapping", "3"]),
        ("- 1\n- 2", ["top level", "run.yaml", "mapping"]),
        ("train: {max_steps: true}", ["train.max_steps", "run.yaml", "True", "whole number"]),
        ("train: {max_steps: null}", ["train.max_steps", "run.yaml", "None", "whole number"]),
        ("hub: {revision: 12}", ["hub.revision", "run.yaml", "12", "text"]),
        ("photon: {memory_layers: 3}", ["photon.memory_layers", "run.yaml", "3", "list", "whole number"]),
        ("photon: {levels: [3]}", ["photon.levels.0", "run.yaml", "mapping"]),
        ("photon: {levels: [{slots: 3}]}", ["photon.levels.0.slots", "run.yaml"]),
        ("resume: 1", ["resume", "run.yaml", "true or false"]),
        ("seed: 1\nseed: 2", ["run.yaml", "'seed'", "twice"]),
        ("train: {max_steps: 3", ["run.yaml", "not valid YAML"]),
        ("seed: !!python/object/apply:os.getcwd []", ["run.yaml", "not valid YAML"]),
    ],
)
def test_bad_yaml_is_one_clear_error(yaml_file, text: str, parts: list[str]) -> None:
    with pytest.raises(PhotonError) as error:
        load("--config", yaml_file(text))
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("argv", "key"),
    [
        (["--preset", "grafted"], "preset"),
        (["--photon.layout", "dense"], "photon.layout"),
        (["--photon.conditioning", "film"], "photon.conditioning"),
        (["--photon.unit_positions", "none"], "photon.unit_positions"),
        (["--train.mixed_precision", "int8"], "train.mixed_precision"),
        (["--tracking.tracker", "mlflow"], "tracking.tracker"),
        (["--tracking.mode", "sometimes"], "tracking.mode"),
        (["--export.dtype", "int4"], "export.dtype"),
        (["--train.max_steps", "0"], "train.max_steps"),
        (["--train.batch_size", "-1"], "train.batch_size"),
        (["--train.learning_rate", "0"], "train.learning_rate"),
        (["--dataset.held_out_fraction", "1"], "dataset.held_out_fraction"),
        (["--lora.dropout", "1"], "lora.dropout"),
        (["--photon.levels.1.chunk_size", "0"], "photon.levels.1.chunk_size"),
        (["--photon.memory_layers", "1,1"], "photon.memory_layers"),
        (["--photon.full_attention_layers", "-1"], "photon.full_attention_layers"),
        (["--photon.num_levels", "1", "--photon.levels.1.chunk_size", "4"], "photon.levels"),
        (["--export.max_shard_size", "big"], "export.max_shard_size"),
        (["--output", ""], "output"),
    ],
)
def test_bad_values_are_refused(argv: list[str], key: str) -> None:
    with pytest.raises(PhotonError, match=re.escape(key)):
        load(*argv)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--dataset.sources.0.weight", "2"], "dataset.sources.0 needs a path"),
        (["--dataset.sources.0.path", "a", "--dataset.sources.0.weight", "0"], "weight greater than 0"),
        (["--data", "b", "--dataset.sources.0.path", "a"], "data and dataset.sources are both set"),
    ],
)
def test_sources_of_a_mixture_are_checked(argv: list[str], message: str) -> None:
    with pytest.raises(PhotonError, match=message):
        load(*argv)


def test_every_checked_key_exists() -> None:
    from photon_train import config_check

    tables = (config_check._CHOICES, config_check._AT_LEAST, config_check._ABOVE, config_check._BELOW)
    assert {key for table in tables for key in table} <= set(all_keys())
    assert set(config_check._LEVEL_AT_LEAST) == set(field_types(LevelOverrides))


def test_every_number_is_checked() -> None:
    """A new numeric setting needs a range, or the entry here that says why it has none."""
    from photon_train import config_check

    checked = {*config_check._AT_LEAST, *config_check._ABOVE}
    numeric = set()
    for key in all_keys():
        kind = cli._type_of_key(key)
        if not {"levels", "sources"} & set(key.split(".")) and cli.without_none(kind) in (int, float):
            numeric.add(key)
    assert numeric == checked


def test_help_explains_every_setting_with_its_default(capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        load("--preset", "nonsense", "--help", defaults=RunConfig(seed=4321))
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for key in all_keys():
        assert f"--{key.replace('.0.', '.N.')} " in text
    assert "A recipe." in text
    assert "4321" in text, "the recipe's own defaults are shown"
    words = " ".join(text.split())
    assert "Peak learning rate of the LoRA parameters. (default: 0.0002)" in words


def test_every_setting_is_documented() -> None:
    kinds = [RunConfig, LevelOverrides, SourceSettings]
    while kinds:
        kind = kinds.pop()
        groups = {name: t for name, t in field_types(kind).items() if dataclasses.is_dataclass(t)}
        assert set(field_docs(kind)) == set(field_types(kind)) - set(groups), kind
        kinds.extend(groups.values())


def test_help_does_not_import_torch() -> None:
    code = "import sys; import photon_train.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def _values(kind):
    base = {int: st.integers(0, 9), float: st.floats(1e-12, 1e12), bool: st.booleans(), str: st.text(max_size=8)}[kind]
    odd = st.sampled_from(["no", "1e-4", "2024-01-01", "null", "~", "1:30", "0o7", " a", "#b", "é", ".5", "12"])
    return base | odd if kind is str else base


def _strategy(kind):
    if dataclasses.is_dataclass(kind):
        return st.builds(kind, **{name: _strategy(t) for name, t in field_types(kind).items()})
    inner = cli.without_none(kind)
    element = cli.element_type(kind)
    values = st.lists(_strategy(element), max_size=2) if element else _values(inner)
    return values if inner is kind else st.none() | values


@settings(max_examples=20)
@given(_strategy(RunConfig))
def test_yaml_round_trip(config: RunConfig) -> None:
    config.hub.token = None
    read = RunConfig()
    merge(read, parse_yaml(cli.to_yaml(config), "text"), "", "text")
    assert read == config


def test_token_is_never_written() -> None:
    config = load("--hub.token", "hf_secret")
    assert config.hub.token == "hf_secret"
    assert "hf_secret" not in cli.to_yaml(config) and "hf_secret" not in str(cli.to_dict(config))


def _fail() -> None:
    raise PhotonError("a.yaml:\n  mend it")


def _fill_the_disk() -> None:
    raise OSError(errno.ENOSPC, "No space left on device", "out/plan.json")


def test_an_error_of_one_process_alone_is_said(capsys, monkeypatch) -> None:
    """One that all meet is said once: the launcher ends the others while they wait."""
    waited = []
    monkeypatch.setattr(time, "sleep", waited.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("RANK", "9")
    with pytest.raises(SystemExit) as stop:
        cli.main_wrapper(_fail)
    assert stop.value.code == 2 and waited[0] >= 5
    assert capsys.readouterr().err == "error (process 9): a.yaml: mend it\n"


def test_main_wrapper(capsys, monkeypatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(SystemExit) as stop:
        cli.main_wrapper(_fail)
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: a.yaml: mend it\n"
    with pytest.raises(SystemExit) as stop:
        cli.main_wrapper(_fill_the_disk)
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("error: out/plan.json cannot be written: No space left on device; ")
    with pytest.raises(FileNotFoundError):
        cli.main_wrapper(lambda: open("/nowhere/at/all"))
    with pytest.raises(SystemExit) as stop:
        cli.main_wrapper(lambda: None)
    assert stop.value.code == 0
    with pytest.raises(ZeroDivisionError):
        cli.main_wrapper(lambda: 1 // 0)
