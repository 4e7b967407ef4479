"""Bad input to the main command: one line that names the key or file, exit status 2, nothing written."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoint import tiny_checkpoint

from photon_train.config import RunConfig, load_config
from photon_train.errors import PhotonError
from photon_train.pipeline.stages import Stages

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "convert_llama.py"


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    return tiny_checkpoint(tmp_path / "dense")


def run(monkeypatch, capsys, *arguments: object) -> str:
    """Run the recipe with `arguments`; the one line that it printed to stderr."""
    # One process has one precision, and other tests of it have chosen.
    precision = ("--train.mixed_precision", "no")
    monkeypatch.setattr(sys, "argv", ["convert_llama.py", *precision, *map(str, arguments)])
    spec = importlib.util.spec_from_file_location("convert_llama", RECIPE)
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    with pytest.raises(SystemExit) as exit_:
        recipe.main_wrapper(recipe.main)
    assert exit_.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    return lines[0]


def drop_shard(directory: Path) -> str:
    """Split the weights over two files, and lose the second."""
    weights = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names = sorted(weights)
    save_file({name: weights[name] for name in names[:3]}, directory / "model-00001-of-00002.safetensors")
    index = {name: f"model-0000{1 + (i >= 3)}-of-00002.safetensors" for i, name in enumerate(names)}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return "model-00002-of-00002.safetensors"


def truncate(directory: Path) -> str:
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    return "model.safetensors"


def poison(directory: Path) -> str:
    weights = load_file(directory / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return "model.layers.1.mlp.up_proj.weight"


def other_hash(directory: Path) -> str:
    (directory / "manifest.json").write_text(
        json.dumps({"stage": "dense", "files": {"model.safetensors": {"sha256": "0" * 64, "size": 1}}, "config": {}})
    )
    return "model.safetensors"


def shrink_vocabulary(directory: Path) -> str:
    config = json.loads((directory / "config.json").read_text())
    weights = load_file(directory / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = weights[name][:-7].clone()
    config["vocab_size"] -= 7
    (directory / "config.json").write_text(json.dumps(config))
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return "tokenizer"


def other_family(directory: Path) -> str:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "model_type": "gpt2"}))
    return "llama, ministral3, mistral"


def widen(directory: Path) -> str:
    weights = {name: tensor.double() for name, tensor in load_file(directory / "model.safetensors").items()}
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return "set export.dtype=float32"


def pickled(directory: Path) -> str:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    return "pickle files are never read"


@pytest.mark.parametrize(
    "harm", [drop_shard, truncate, poison, other_hash, shrink_vocabulary, other_family, widen, pickled]
)
def test_a_harmed_checkpoint(harm, checkpoint, tmp_path, monkeypatch, capsys):
    named = harm(checkpoint)
    output = tmp_path / "out"
    line = run(monkeypatch, capsys, "--model", checkpoint, "--output", output, *quick(tmp_path))
    assert named in line
    assert not (output / "converted").exists() and not (output / "export").exists()
    assert not [path for path in output.glob(".*")] if output.exists() else True


def quick(directory: Path) -> list[object]:
    text = directory / "text.txt"
    text.write_text("\n\n".join(f"paragraph {i} of some text to train on" for i in range(60)))
    return [
        "--data",
        text,
        "--train.seq_len",
        32,
        "--train.max_steps",
        1,
        "--train.batch_size",
        1,
        "--tracking.tracker",
        "none",
        "--train.dense_baseline",
        "false",
    ]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--trian.max_steps", 3], "trian.max_steps"),
        (["--train.max_steps", "many"], "train.max_steps"),
        (["--preset", "grfat"], "grfat"),
        (["--photon.chunk_size", 7, "--train.seq_len", 32, "--dataset.isolate_documents", "false"], "train.seq_len"),
        (["--photon.window", 1], "photon.window"),
        (["--photon.num_levels", 2], "photon.num_levels"),
        (["--preset", "paper", "--photon.window", 64], "photon.window"),
        (["--model", "/nonexistent/model"], "/nonexistent/model"),
        (["--data", "/nonexistent/text"], "/nonexistent/text"),
        (["--photon.memory_cells", "9:0"], "photon.memory_cells"),
        (["--photon.memory_cells", "1:0,1:2"], "photon.memory_cells"),
        (["--photon.memory_budget", "0.01"], "photon.memory_budget"),
        (["--lora.target_modules", "q_porj"], "lora.target_modules"),
    ],
)
def test_wrong_settings(arguments, named, checkpoint, tmp_path, monkeypatch, capsys):
    output = tmp_path / "out"
    base = ["--model", checkpoint, "--output", output, *quick(tmp_path)]
    assert named in run(monkeypatch, capsys, *base, *arguments)
    assert not (output / "converted").exists()


def test_an_unknown_key_in_yaml_names_the_file(checkpoint, tmp_path, monkeypatch, capsys):
    file = tmp_path / "run.yaml"
    file.write_text("train:\n  max_step: 3\n")
    line = run(monkeypatch, capsys, "--model", checkpoint, "--config", file)
    assert "run.yaml" in line and "train.max_step" in line


def test_an_output_that_is_not_empty_is_left_alone(checkpoint, tmp_path, monkeypatch, capsys):
    output = tmp_path / "out"
    output.mkdir()
    (output / "thesis.txt").write_text("years of work")
    arguments = ["--model", checkpoint, "--output", output, *quick(tmp_path)]
    assert "not empty" in run(monkeypatch, capsys, *arguments)
    assert "another directory" in run(monkeypatch, capsys, *arguments, "--resume")
    assert [path.name for path in output.iterdir()] == ["thesis.txt"]


def test_the_same_command_goes_on_after_a_kill_between_stages(checkpoint, tmp_path, monkeypatch, capsys):
    """Killed after the conversion was complete and before that was recorded, and while something was written."""
    from photon_train.pipeline import run_conversion

    arguments = ["--model", checkpoint, "--output", tmp_path / "out", *quick(tmp_path), "--resume"]
    config = load_config([*map(str, arguments), "--train.mixed_precision", "no"], prog="", description="")

    class Killed(BaseException):
        pass

    def killed(self, name, stage):
        stage()
        assert (tmp_path / "out" / ".lock").is_file()
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Stages, "run", killed)
        run_conversion(config)
    converted = tmp_path / "out" / "converted"
    before = (converted / "manifest.json").read_text()
    (tmp_path / "out" / ".export.0123456789ab").mkdir()
    (tmp_path / "out" / ".stages.json.0123456789ab").write_text("{")
    run_conversion(config)
    assert (converted / "manifest.json").read_text() == before, "the conversion was not done again"
    assert not list((tmp_path / "out").glob(".*")) and (tmp_path / "out" / "report.md").is_file()


def test_a_kill_before_anything_was_written_leaves_no_obstacle(checkpoint, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".stages.json.0123456789ab").write_text("{")
    assert Stages(RunConfig(output=str(tmp_path / "out"), resume=True), writes=True).done == {}


def test_too_little_disk_is_known_before_anything_is_written(checkpoint, tmp_path, monkeypatch, capsys):
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
    output = tmp_path / "out"
    line = run(monkeypatch, capsys, "--model", checkpoint, "--output", output, *quick(tmp_path))
    assert "GB free, converted/ with export/ needs" in line and not (output / "converted").exists()


def test_a_run_goes_on_with_other_processes_at_the_same_sequences_per_step(tmp_path):
    def settings(batch_size: int, accumulation: int) -> RunConfig:
        config = RunConfig(output=str(tmp_path / "out"), resume=True)
        config.train.batch_size, config.train.gradient_accumulation_steps = batch_size, accumulation
        return config

    begun = settings(4, 1)
    Stages(begun, writes=True, num_processes=2).begin(begun)
    assert Stages(settings(2, 1), True, num_processes=4).done == {}
    assert Stages(settings(4, 2), True, num_processes=1).done == {}
    with pytest.raises(PhotonError, match=r"another sequences per step \(processes x .*same settings"):
        Stages(begun, True, num_processes=1)


def test_a_run_goes_on_with_the_text_that_it_was_begun_with(tmp_path):
    """A stage was finished with one text, and the next one begun with another."""
    config = RunConfig(output=str(tmp_path / "out"), resume=True)
    stages = Stages(config, writes=True)
    stages.bind_text({"hash of the training text": "a", "hash of the held-out text": "b"})
    stages.begin(config)
    Stages(config, writes=True).bind_text({"hash of the training text": "a", "hash of the held-out text": "b"})
    with pytest.raises(PhotonError, match=r"with another hash of the training text \(files .*restore the text"):
        Stages(config, writes=True).bind_text({"hash of the training text": "c", "hash of the held-out text": "b"})


def test_a_run_goes_on_with_the_revision_that_it_was_begun_with(tmp_path):
    """Its checkpoints belong to those weights; the token may be another."""
    config = RunConfig(output=str(tmp_path / "out"), resume=True)
    config.hub.revision, config.hub.token = "v1", "one"
    Stages(config, writes=True).begin(config)
    config.hub.token = "two"
    assert Stages(config, writes=True).done == {}
    config.hub.revision = "v2"
    with pytest.raises(PhotonError, match=r"another hub.revision"):
        Stages(config, writes=True)
