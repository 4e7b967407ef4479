"""The other recipes, a sweep as W&B's agent runs it, and the artifact of the export."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tiny_checkpoint import tiny_checkpoint

from photon_train.config import load_config
from photon_train.errors import PhotonError
from photon_train.manifest import read_manifest, verify_manifest
from photon_train.pipeline import run_finetuning

ROOT = Path(__file__).resolve().parents[2]
QUICK = {
    "train.mixed_precision": "no",
    "train.dense_baseline": "false",
    "train.seq_len": 64,
    "train.max_steps": 2,
    "train.batch_size": 2,
    "train.log_every": 1,
    "train.eval_sequences": 2,
    "lora.rank": 2,
    "photon.window": 16,
    "photon.num_sinks": 0,
    "export.sample_tokens": 4,
    "tracking.tracker": "none",
}


def arguments(**settings: object) -> list[str]:
    return [part for key, value in {**QUICK, **settings}.items() for part in (f"--{key}", str(value))]


def config(**settings: object):
    return load_config(arguments(**settings), prog="", description="")


def finetuning(**settings: object):
    return config(
        **{key: value for key, value in {"photon.window": None, "photon.num_sinks": None, **settings}.items()}
    )


def run_recipe(name: str, monkeypatch, *arguments: str) -> None:
    spec = importlib.util.spec_from_file_location(name, ROOT / "recipes" / f"{name}.py")
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
    recipe.main()


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("text")
    for index in range(8):
        (directory / f"{index}.txt").write_text("\n".join(f"line {i * index % 7} of a text" for i in range(40)))
    return directory


@pytest.fixture(scope="module")
def converted(tmp_path_factory, text) -> Path:
    """The output of a conversion of a tiny Qwen3 by the recipe for Qwen."""
    directory = tmp_path_factory.mktemp("run")
    tiny_checkpoint(directory / "dense", "qwen3")
    with pytest.MonkeyPatch.context() as monkeypatch:
        settings = {"model": directory / "dense", "data": text, "output": directory / "out"}
        run_recipe("convert_qwen", monkeypatch, *arguments(**settings))
    return directory / "out"


def test_the_recipe_for_qwen_converts_qwen_with_its_defaults(converted):
    written = yaml.safe_load((converted / "config.yaml").read_text())
    assert written["train"]["gradient_accumulation_steps"] == 2 and written["train"]["max_steps"] == 2
    model = json.loads((converted / "export" / "config.json").read_text())
    assert (model["model_type"], model["base_model_type"]) == ("photon", "qwen3")
    verify_manifest(converted / "export")


def test_the_recipe_for_qwen_refuses_others(tmp_path, text, monkeypatch):
    dense = tiny_checkpoint(tmp_path / "dense")
    settings = arguments(model=dense, data=text, output=tmp_path / "out")
    with pytest.raises(PhotonError, match="is a llama model and this command is for qwen2, qwen3: take `photon"):
        run_recipe("convert_qwen", monkeypatch, *settings)
    with pytest.raises(PhotonError, match="model is not set"):
        run_recipe("convert_qwen", monkeypatch)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("stage", ["converted", "export"])
def test_a_converted_model_is_fine_tuned_further(stage, converted, tmp_path, text):
    settings = {"model": converted / stage, "data": text, "output": tmp_path / "out", "train.learning_rate": 1e-2}
    run_finetuning(finetuning(**settings))
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["tuned_ce"] < report["start_ce"] and "converted_ce" not in report and "dense_ce" not in report
    before = json.loads((converted / "report.json").read_text())
    expected = before["converted_ce" if stage == "converted" else "tuned_ce"]
    assert report["start_ce"] == pytest.approx(expected, rel=1e-5)
    inputs = read_manifest(tmp_path / "out" / "export")["inputs"]
    assert inputs["converted"]["path"] == str(converted / stage)
    one, other = (load_file(d / "export" / "model.safetensors") for d in (converted, tmp_path / "out"))
    assert one.keys() == other.keys() and any(not one[name].equal(other[name]) for name in one)


def test_fine_tuning_needs_a_photon_model_and_leaves_its_architecture(converted, tmp_path, text):
    with pytest.raises(PhotonError, match="is a llama model and no PHOTON model: convert it"):
        run_finetuning(finetuning(model=tiny_checkpoint(tmp_path / "dense"), data=text))
    with pytest.raises(PhotonError, match="holds no config.json"):
        run_finetuning(finetuning(model=tmp_path / "nothing", data=text))
    with pytest.raises(PhotonError, match="photon.. is set, but what a converted model is made of"):
        run_finetuning(config(model=converted / "export", data=text))
    with pytest.raises(PhotonError, match="model is not set"):
        run_finetuning(finetuning(data=text))


def harmed(converted: Path, directory: Path, harm) -> Path:
    """A copy of the export in which `harm` has changed the weights."""
    shutil.copytree(converted / "export", directory)
    (directory / "manifest.json").unlink()
    weights = load_file(directory / "model.safetensors")
    harm(weights)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.mark.parametrize(
    ("harm", "dtype", "message"),
    [
        (lambda weights: weights["model.norm.weight"].fill_(1e6), "float16", "norm.weight is not finite in .*float16"),
        (lambda weights: weights["model.norm.weight"].fill_(torch.nan), "auto", "norm.weight is not finite in"),
        (lambda weights: weights.pop("model.norm.weight"), "auto", r"lacks tensor model.norm.weight \(1 in all\)"),
    ],
)
def test_what_cannot_be_exported_is_not_trained(harm, dtype, message, converted, tmp_path, text, monkeypatch):
    monkeypatch.setattr("photon_train.pipeline.base.train", lambda *_, **__: pytest.fail("trained"))
    settings = {"model": harmed(converted, tmp_path / "in", harm), "data": text, "output": tmp_path / "out"}
    with pytest.raises(PhotonError, match=message):
        run_finetuning(finetuning(**settings, **{"export.dtype": dtype}))


def test_a_disk_without_room_for_the_export_is_not_trained_on(converted, tmp_path, text, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(PhotonError, match=r"GB free, export/ needs"):
        run_finetuning(finetuning(model=converted / "export", data=text, output=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["finetune", "generate", "serve", "evaluate"])
def test_an_export_of_an_older_layout_is_refused_in_one_line(command, converted, tmp_path, text, monkeypatch):
    old = tmp_path / "export"
    shutil.copytree(converted / "export", old)
    (old / "manifest.json").unlink()
    config = {"model_type": "photon", "base_config": {"model_type": "llama"}, "levels": [], "preset": "graft"}
    (old / "config.json").write_text(json.dumps(config))
    more = {"finetune": ["--data", text], "generate": ["--prompt", "a"], "serve": []}
    if command == "evaluate":
        monkeypatch.setattr("photon_train.evaluation.harness.open_tasks", lambda *_: None)
        more["evaluate"] = ["--tasks", "any"]
    main = importlib.import_module(f"photon_train.commands.{command}").main
    with pytest.raises(PhotonError, match="layout of an older photon-train.*: convert the dense model again") as error:
        main(["--model", str(old), *map(str, more[command])])
    assert "\n" not in str(error.value)


def test_dry_run_of_fine_tuning_writes_nothing(converted, tmp_path, text, capsys, monkeypatch):
    """And says what it would take: the estimate, and the accelerate config for a GPU of the size given."""
    monkeypatch.setenv("COLUMNS", "160")
    settings = {"model": converted / "export", "data": text, "output": tmp_path / "out", "dry_run": "true"}
    run_finetuning(finetuning(**settings, **{"train.gpu_memory": "24GiB"}))
    shown = " ".join(capsys.readouterr().out.split())
    assert "Training memory per process" in shown and "Fits 1 GPU of 24.00 GiB" in shown
    assert "accelerate_configs/single_gpu.yaml" in shown and not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.distributed
def test_a_sweep_runs_the_recipe_with_dotted_overrides(converted, tmp_path, text):
    """A simulated controller draws the parameters; the command line is made by the code of W&B's agent."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    sweep = yaml.safe_load((ROOT / "recipes" / "sweeps" / "lora.yaml").read_text())
    draw = random.Random(0)
    chosen = {}
    for key, space in sweep["parameters"].items():
        value = space.get("value", draw.choice(space["values"]) if "values" in space else None)
        chosen[key] = {"value": draw.uniform(space["min"], space["max"]) if value is None else value}
    chosen["train.max_steps"] = {"value": 2}
    variables = {**create_sweep_command_args({"args": chosen}), "program": [str(ROOT / sweep["program"])]}
    command = []
    for part in create_sweep_command(sweep["command"]):
        command += variables[part[2:-1]] if part.startswith("${") else [part]
    # What the user edits, and quick settings.
    others = {k: v for k, v in QUICK.items() if k not in chosen and not k.startswith(("photon.", "tracking."))}
    quick = " ".join(f"--{key} {value}" for key, value in others.items())
    edits = {
        "accelerate launch": f"{sys.executable} -m accelerate.commands.launch --quiet",
        "accelerate_configs/single_gpu.yaml": str(ROOT / "accelerate_configs" / "cpu.yaml"),
        "runs/llama-1b/converted": str(converted / "converted"),
        "--data my_texts": f"--data {text} {quick}",
    }
    for old, new in edits.items():
        assert old in command[2]
        command[2] = command[2].replace(old, new)
    environment = {
        **os.environ,
        "WANDB_SWEEP_ID": "sweep123",
        "WANDB_RUN_ID": "run12345",
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "kernels"))),
        "WANDB_DIR": "",
    }
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-3000:]
    output = tmp_path / "runs" / "sweep" / "run12345"
    written = yaml.safe_load((output / "config.yaml").read_text())
    for key, value in chosen.items():
        group, name = key.split(".")
        assert float(written[group][name]) == value["value"]
    names = [path.name for path in (output / "wandb").glob("offline-run-*")]
    # W&B numbers the folders of one run that start in one second.
    expected = re.compile(r"offline-run-\d+_\d+-run12345(-\d+)?")
    assert names and all(map(expected.fullmatch, names)), "the run is the one that the agent waits for"
    assert not (output / "tracking.json").exists()


class _FakeRun:
    """A W&B run that is online."""

    offline = False

    def __init__(self, **arguments: object) -> None:
        self.arguments, self.used, self.logged = arguments, [], []

    def __enter__(self) -> _FakeRun:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def use_artifact(self, artifact) -> None:
        self.used.append(artifact)

    def log_artifact(self, artifact) -> None:
        self.logged.append(artifact)


def test_the_export_is_an_artifact_with_its_lineage(converted, tmp_path, text, monkeypatch):
    import wandb

    from photon_train.config import TrackingSettings
    from photon_train.training.artifacts import log_export

    (tmp_path / "tracking.json").write_text('{"photon": "abcd1234"}')
    settings = config(model=converted.parent / "dense", data="owner/texts")
    settings.tracking = TrackingSettings(run_name="my run")
    runs = []
    monkeypatch.setattr(wandb, "init", lambda **arguments: runs.append(_FakeRun(**arguments)) or runs[-1])
    inputs = {"model": settings.model, "data": settings.data}
    report = {"tuned_ce": 1.5, "seconds": {"dense": 1.0}}
    assert log_export(settings, tmp_path, converted / "export", inputs, report) == "my-run-export"
    (run,) = runs
    assert (run.arguments["id"], run.arguments["resume"]) == ("abcd1234", "allow")
    assert [artifact.type for artifact in run.used] == ["model", "dataset"]
    uris = [entry.ref for artifact in run.used for entry in artifact.manifest.entries.values()]
    assert uris[-1] == "https://huggingface.co/datasets/owner/texts" and uris[0].startswith("file:///")
    (export,) = run.logged
    assert export.metadata == {"tuned_ce": 1.5, "made_from": inputs}
    assert "export_manifest.json" in export.manifest.entries
    monkeypatch.setattr(wandb, "init", lambda **_: 1 / 0)
    assert log_export(settings, tmp_path, converted / "export", inputs, report) is None
    settings.tracking.artifact = "none"
    assert log_export(settings, tmp_path, converted / "export", inputs, report) is None


def test_an_offline_run_logs_the_artifact_too(converted, tmp_path, text):
    run_finetuning(
        finetuning(model=converted / "export", data=text, output=tmp_path / "out", **{"tracking.tracker": "wandb"})
    )
    stages = json.loads((tmp_path / "out" / "stages.json").read_text())
    assert stages["done"]["artifact"]["name"] == "photon-export"
    (identity,) = json.loads((tmp_path / "out" / "tracking.json").read_text()).values()
    runs = sorted((tmp_path / "out" / "wandb").glob(f"offline-run-*-{identity}*/run-*.wandb"))
    assert any(b"photon-export" in path.read_bytes() for path in runs)
