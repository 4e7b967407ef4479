"""Loading of the configuration: precedence, strictness, help, round trip."""

from __future__ import annotations

import dataclasses
import errno
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from photon_train.cli import main_wrapper
from photon_train.config import LevelOverrides, RunConfig, TrainSettings, load_config, to_dict, to_yaml
from photon_train.config.keys import ROOT, all_keys, find
from photon_train.config.load import check
from photon_train.config.schema import _number
from photon_train.config.yaml import parse_yaml
from photon_train.errors import PhotonError

KEYS = [key for key, _ in all_keys()]


def load(*argv: str, defaults: RunConfig | None = None) -> RunConfig:
    return load_config(list(argv), prog="recipe.py", description="A recipe.", defaults=defaults)


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
    assert load("--photon.full_attention_layers", text).photon.full_attention_layers == [0, 2]


@pytest.mark.parametrize("text", ["7:2,18:0", "[7:2, 18:0]", '["7:2", "18:0"]'])
def test_lists_of_cells(text: str, yaml_file) -> None:
    """Which YAML 1.1 would read as numbers of base 60."""
    assert load("--photon.memory_cells", text).photon.memory_cells == ["7:2", "18:0"]
    if text.startswith("["):
        assert load("--config", yaml_file(f"photon: {{memory_cells: {text}}}")).photon.memory_cells == ["7:2", "18:0"]


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_choices_of_numbers(bits: int, yaml_file) -> None:
    assert load("--photon.memory_bits", str(bits)).photon.memory_bits == bits
    assert load("--config", yaml_file(f"photon: {{memory_bits: {bits}}}")).photon.memory_bits == bits


def test_lists_of_text_empty_and_unset() -> None:
    config = load("--lora.target_modules", "q_proj,v_proj", "--photon.memory_cells", "[]")
    assert config.lora.target_modules == ["q_proj", "v_proj"]
    assert config.photon.memory_cells == []
    assert load("--photon.memory_cells", "none").photon.memory_cells is None


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
        (["--photon.memory_cells.0", "3:0"], ["photon.memory_cells.0", "did you mean 'photon.memory_cells'"]),
        (["--xyzzy", "3"], ["xyzzy", "--help"]),
        (["--=3"], ["group", "--help"]),
        (["--train", "3"], ["--train", "group"]),
        (["--train.max_steps"], ["--train.max_steps", "value"]),
        (["--train.max_steps", "--resume"], ["--train.max_steps", "value"]),
        (["200"], ["'200'", "--key value"]),
        (["--train.max_steps", "many"], ["train.max_steps", "'many'", "whole number"]),
        (["--train.max_steps", "1.5"], ["train.max_steps", "'1.5'", "whole number"]),
        (["--train.learning_rate", "nan"], ["train.learning_rate", "nan", "finite"]),
        (["--train.dense_baseline", "maybe"], ["train.dense_baseline", "'maybe'", "true or false"]),
        (["--photon.full_attention_layers", "a,b"], ["photon.full_attention_layers.0", "'a'", "whole number"]),
        (["--photon.full_attention_layers", "[0"], ["command line", "not valid YAML"]),
        (["--photon.memory_cells", "7:2,a"], ["photon.memory_cells.1", "'a'", "layer:head", "such as 7:2"]),
        (["--photon.memory_cells", "7"], ["photon.memory_cells.0", "'7'", "layer:head", "such as 7:2"]),
        (["--photon.memory_cells", "7:-1"], ["photon.memory_cells.0", "'7:-1'", "layer:head"]),
        (["--photon.memory_bits", "5"], ["photon.memory_bits", "'5'", "one of 4, 8, 16"]),
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
        ("photon: {memory_cells: 3}", ["photon.memory_cells", "run.yaml", "3", "list", "whole number"]),
        ("photon: {memory_cells: [3]}", ["photon.memory_cells.0", "run.yaml", "3", "layer:head"]),
        ("photon: {memory_cells: {3: [0]}}", ["photon.memory_cells", "run.yaml", "list", "layer:head"]),
        ("photon: {full_attention_layers: 3}", ["photon.full_attention_layers", "run.yaml", "3", "list"]),
        ("photon: {levels: [3]}", ["photon.levels.0", "run.yaml", "mapping"]),
        ("photon: {levels: [{slots: 3}]}", ["photon.levels.0.slots", "run.yaml"]),
        ("photon: {levels: 3}", ["photon.levels", "run.yaml", "list"]),
        ("photon: {levels: [{1: 3}]}", ["photon.levels.0", "1", "run.yaml"]),
        ("train: {1: 3}", ["train.1", "run.yaml"]),
        ("train: {max_steps: 0}", ["train.max_steps", "run.yaml", "0", "at least 1"]),
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
        (["--preset", "grafted"], "preset on the command line is 'grafted'; expected one of graft, split"),
        (["--train.mixed_precision", "int8"], "train.mixed_precision"),
        (["--tracking.tracker", "mlflow"], "tracking.tracker"),
        (["--tracking.mode", "sometimes"], "tracking.mode"),
        (["--export.dtype", "int4"], "export.dtype"),
        (["--train.max_steps", "0"], "train.max_steps"),
        (["--train.batch_size", "-1"], "train.batch_size"),
        (["--train.learning_rate", "0"], "train.learning_rate"),
        (["--dataset.held_out_fraction", "1"], "dataset.held_out_fraction"),
        (["--lora.dropout", "1"], "lora.dropout"),
        (["--lora.rank", "-1"], "lora.rank"),
        (["--photon.levels.1.chunk_size", "0"], "photon.levels.1.chunk_size"),
        (["--photon.levels.0.num_slots", "0"], "photon.levels.0.num_slots"),
        (["--photon.levels.0.encoder_window", "-1"], "photon.levels.0.encoder_window"),
        (["--photon.levels.0.encoder_layers", "-1"], "photon.levels.0.encoder_layers"),
        (["--photon.num_levels", "0"], "photon.num_levels"),
        (["--photon.num_sinks", "-1"], "photon.num_sinks"),
        (["--photon.latents_per_unit", "3"], "photon.latents_per_unit on the command line is '3'; expected a"),
        (["--train.log_every", "0"], "train.log_every"),
        (["--train.gpu_memory", "80"], "train.gpu_memory on the command line is '80'; expected a size such as"),
        (["--photon.memory_budget", "1", "--photon.memory_cells", "1:0"], "photon.memory_cells is set"),
        (["--photon.memory_budget", "0"], "photon.memory_budget on the command line is '0'; expected a finite number"),
        (["--photon.memory_budget", "101"], "photon.memory_budget on the command line is '101'; expected a finite"),
        (["--photon.memory_cells", "1:0,1:0"], "photon.memory_cells"),
        (["--photon.full_attention_layers", "1,1"], "photon.full_attention_layers"),
        (["--photon.full_attention_layers", "-1"], "photon.full_attention_layers"),
        (["--photon.num_levels", "1", "--photon.levels.1.chunk_size", "4"], "photon.levels"),
        (["--export.max_shard_size", "big"], "export.max_shard_size"),
        (["--output", ""], "output"),
        (
            ["--photon.window", "1e18"],
            "photon.window on the command line is '1e18'; expected a whole number, at least 1, at",
        ),
        (["--photon.num_sinks", "1000000000000000000"], "at least 0, at most 1073741824"),
        (["--train.seq_len", "1e12"], "train.seq_len"),
        (["--train.batch_size", "1e12"], "train.batch_size"),
        (["--lora.rank", "1e12"], "lora.rank"),
        (["--train.learning_rate", "1e308"], "train.learning_rate"),
        (["--distill.weight", "1e31"], "distill.weight"),
        (["--dataset.chat_template", "t.jinja"], "dataset.chat_template is set and no conversations are read"),
        (["--export.sample_prompt", ""], "export.sample_prompt on the command line is ''; expected text that is not"),
    ],
)
def test_bad_values_are_refused(argv: list[str], key: str) -> None:
    with pytest.raises(PhotonError, match=re.escape(key)):
        load(*argv)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--dataset.sources.0.weight", "2"], "dataset.sources.0 needs a path"),
        (
            ["--dataset.sources.0.path", "a", "--dataset.sources.0.weight", "0"],
            "dataset.sources.0.weight .*greater than 0",
        ),
        (["--data", "b", "--dataset.sources.0.path", "a"], "data and dataset.sources are both set"),
    ],
)
def test_sources_of_a_mixture_are_checked(argv: list[str], message: str) -> None:
    with pytest.raises(PhotonError, match=message):
        load(*argv)


def test_the_home_directory_stands_for_a_tilde_in_every_path(yaml_file, monkeypatch, tmp_path) -> None:
    """In YAML and after ``--key=`` no shell puts it there."""
    monkeypatch.setenv("HOME", str(tmp_path))
    text = "model: ~/m\noutput: ~/o\ndataset: {messages_field: m, chat_template: ~/t, sources: [{path: ~/s}]}"
    Path(tmp_path, "home.yaml").write_text(text)
    config = load("--config=~/home.yaml", "--dataset.sources.1.path", "~/s2")
    found = [config.model, config.output, config.dataset.chat_template, *(s.path for s in config.dataset.sources)]
    assert found == [f"{tmp_path}/{name}" for name in ("m", "o", "t", "s", "s2")]
    assert load("--data=~/d").data == f"{tmp_path}/d"
    assert load("--data=a~b").data == "a~b"


@pytest.mark.parametrize("key", ["model", "data", "output", "dataset.chat_template", "dataset.sources.0.path"])
def test_the_home_of_nobody_is_refused(key: str) -> None:
    """It would be a directory here, named after the tilde."""
    with pytest.raises(PhotonError, match=rf"{key} on the command line is '~no-such-user/x'; expected a path"):
        load(f"--{key}=~no-such-user/x")


def test_a_value_of_the_command_line_does_not_hide_a_wrong_one_of_a_file(yaml_file) -> None:
    with pytest.raises(PhotonError, match=r"photon.levels in .*run.yaml is 3; expected a list"):
        load("--config", yaml_file("photon: {levels: 3}"), "--photon.levels.0.chunk_size", "4")


def test_a_default_of_the_code_is_checked_where_it_is_set() -> None:
    with pytest.raises(ValidationError, match="max_steps"):
        TrainSettings(max_steps=0)
    config = RunConfig()
    with pytest.raises(ValidationError, match="max_steps"):
        config.train.max_steps = 0
    with pytest.raises(ValidationError, match="grafted"):
        dataclasses.replace(config, preset="grafted")


def test_every_number_is_bounded() -> None:
    for key in KEYS:
        for node in (find(key), find(key).get("items", {})):
            if node.get("type") in ("integer", "number") and "enum" not in node:
                assert "minimum" in node or "exclusiveMinimum" in node, key
                assert "maximum" in node or "exclusiveMaximum" in node, key


def test_whole_numbers_keep_their_digits() -> None:
    assert _number("9007199254740993") == 2**53 + 1 and _number("1e3") == 1000 and _number("0.5") == 0.5


def test_help_explains_every_setting_with_its_default(capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        load("--preset", "nonsense", "--help", defaults=RunConfig(seed=4321))
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for key in KEYS:
        assert f"--{key.replace('.0.', '.N.')} " in text
    assert "A recipe." in text
    assert "4321" in text, "the recipe's own defaults are shown"
    words = " ".join(text.split())
    assert "Peak learning rate of the LoRA parameters. (greater than 0; default: 0.0002)" in words
    assert "--preset graft|split|paper" in words


def test_every_setting_is_documented() -> None:
    assert len(KEYS) > 70
    for key in KEYS:
        assert find(key)["description"], key


def test_help_does_not_import_torch() -> None:
    code = "import sys; import photon_train.config, photon_train.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def _values(node):
    if "properties" in node:
        return st.fixed_dictionaries({name: _values(field) for name, field in node["properties"].items()})
    if "items" in node:
        values = st.lists(_values(node["items"]), max_size=2, unique="properties" not in node["items"])
    elif "enum" in node:
        values = st.sampled_from(node["enum"])
    elif "layer:head" in node.get("expected", ""):
        values = st.builds("{}:{}".format, st.integers(0, 99), st.integers(0, 99))
    elif "expected" in node:
        values = st.sampled_from(["5GB", "80GiB"])
    elif node["type"] == "string":
        odd = ["no", "1e-4", "2024-01-01", "null", "~", "1:30", "0o7", " a", "#b", "é", ".5", "12"]
        values = st.text(max_size=8) | st.sampled_from(odd)
    else:
        whole, number = st.integers(node.get("minimum", 0), node.get("maximum", 9)), st.floats(1e-12, 0.9)
        values = {"integer": whole, "number": number, "boolean": st.booleans()}[node["type"]]
    return st.none() | values if node["nullable"] else values


@settings(max_examples=20)
@given(_values(ROOT))
def test_yaml_round_trip(values) -> None:
    # Set, these exclude others.
    values["photon"] |= {"memory_budget": None, "num_levels": None}
    values["data"], values["hub"]["token"] = None, None
    if values["lora"]["rank"] == 0:  # 4 bits are for adapters
        values["train"]["base_bits"] = 16
    if values["dataset"]["messages_field"] is None:  # a template is for conversations
        values["dataset"]["chat_template"] = None
    config = check(values, {})
    assert check(parse_yaml(to_yaml(config), "text"), {}) == config


def test_token_is_never_written() -> None:
    config = load("--hub.token", "hf_secret")
    assert config.hub.token == "hf_secret"
    assert "hf_secret" not in to_yaml(config) and "hf_secret" not in str(to_dict(config))


def _fail() -> None:
    raise PhotonError("a.yaml:\n  fix it")


def _fail_with(error: Exception) -> None:
    raise error


def _fill_the_disk() -> None:
    raise OSError(errno.ENOSPC, "No space left on device", "out/plan.json")


def test_an_error_of_one_process_alone_is_said(capsys, monkeypatch) -> None:
    """One that all meet is said once: the launcher ends the others while they wait."""
    waited = []
    monkeypatch.setattr(time, "sleep", waited.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("RANK", "9")
    with pytest.raises(SystemExit) as stop:
        main_wrapper(_fail)
    assert stop.value.code == 2 and waited[0] >= 5
    assert capsys.readouterr().err == "error (process 9): a.yaml: fix it\n"


def test_main_wrapper(capsys, monkeypatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(SystemExit) as stop:
        main_wrapper(_fail)
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: a.yaml: fix it\n"
    with pytest.raises(SystemExit) as stop:
        main_wrapper(_fill_the_disk)
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("error: out/plan.json cannot be written: No space left on device; ")
    for number in (errno.EROFS, errno.EACCES):
        with pytest.raises(SystemExit) as stop:
            main_wrapper(lambda number=number: _fail_with(OSError(number, os.strerror(number), "out/run")))
        assert stop.value.code == 2
        said = capsys.readouterr().err
        assert said == f"error: out/run cannot be used: {os.strerror(number)}; allow it, or give another place\n"
    with pytest.raises(FileNotFoundError):
        main_wrapper(lambda: open("/nowhere/at/all"))
    with pytest.raises(RuntimeError, match="sizes do not match"):
        main_wrapper(lambda: _fail_with(RuntimeError("sizes do not match")))
    for allocate in (
        lambda: torch.empty(2**50),
        lambda: np.empty(2**50),
        lambda: _fail_with(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 TiB.\nDetails")),
        lambda: _fail_with(MemoryError()),
    ):
        with pytest.raises(SystemExit) as stop:
            main_wrapper(allocate)
        said = capsys.readouterr().err
        assert stop.value.code == 2 and said.count("\n") == 1
        assert re.fullmatch(r"error: out of memory: .+ \(.+, line \d+\)\. Lower what is held .*--dry-run.*\n", said)
    with pytest.raises(SystemExit) as stop:
        main_wrapper(lambda: None)
    assert stop.value.code == 0
    with pytest.raises(ZeroDivisionError):
        main_wrapper(lambda: 1 // 0)
    # Where tests run in the background, the signal is ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(SystemExit) as stop:
        main_wrapper(lambda: signal.raise_signal(signal.SIGINT))
    signal.signal(signal.SIGINT, before)
    assert stop.value.code == 130 and capsys.readouterr().err == "interrupted\n"


def ended(code: str, **environment: str) -> tuple[int, str]:
    """Status and stderr of a program whose stdout is a pipe that nobody reads."""
    wrapped = f"from photon_train.cli import main_wrapper\n{code}\nmain_wrapper(main)"
    reading, writing = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-c", wrapped],
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )
    os.close(writing)
    os.close(reading)
    return process.wait(timeout=60), process.stderr.read()


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("then", ["", "raise SystemExit(0)"])
def test_a_reader_that_has_seen_enough_is_no_error(unbuffered: str, then: str) -> None:
    """As `photon-train --help | head -1`: with the status of other programs that a pipe ends."""
    code = f"import time\ndef main():\n time.sleep(0.2)\n print('x' * 100_000)\n {then}"
    assert ended(code, PYTHONUNBUFFERED=unbuffered) == (141, "")


def test_a_pipe_that_is_not_stdout_breaks_with_a_traceback(capsys) -> None:
    def broken() -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        main_wrapper(broken)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_what_stdout_cannot_write_is_written_by_its_number(encoding: str) -> None:
    """A run must not end with an error because its report, or a model's text, has a letter that a terminal has not."""
    code = "from photon_train.cli import main_wrapper; main_wrapper(lambda: print('a \\u2014 \\ud800'))"
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment, timeout=60)
    dash = "\u2014" if encoding == "utf-8" else r"\u2014"
    assert (done.returncode, done.stdout.decode(encoding), done.stderr) == (0, f"a {dash} \\ud800\n", b"")
