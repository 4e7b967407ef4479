"""The wheel that `pip install photon-train` would bring: complete, and its commands run where there is no checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from tiny_checkpoint import tiny_checkpoint

from photon_train import __version__
from photon_train.commands.__main__ import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {
    "photon_train": ROOT / "photon_train",
    "photon_kernels": ROOT / "kernels" / "photon_kernels",
    "photon_vllm": ROOT / "photon_vllm",
}
# A few steps of a tiny model.
SETTINGS = {
    "train.mixed_precision": "no",
    "train.dense_baseline": "false",
    "train.seq_len": 64,
    "train.max_steps": 4,
    "train.learning_rate": 1e-2,
    "train.new_modules_learning_rate": 1e-2,
    "train.batch_size": 2,
    "train.eval_sequences": 2,
    "lora.rank": 2,
    "photon.window": 16,
    "export.sample_tokens": 4,
    "tracking.tracker": "none",
}


def files_of(package: Path) -> set[str]:
    """Names of a package's files as a wheel has them."""
    found = (path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {f"{package.name}/{path.relative_to(package).as_posix()}" for path in found}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built by pip from a copy of the sources: what a build leaves behind stays out of the checkout."""
    directory = tmp_path_factory.mktemp("wheel")
    source = directory / "source"
    for path in [ROOT / "pyproject.toml", ROOT / "LICENSE", *PACKAGES.values(), ROOT / "tools", ROOT / "recipes"]:
        target = source / path.relative_to(ROOT)
        if path.is_dir():
            shutil.copytree(path, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    pip(directory, "wheel", "--no-build-isolation", "--wheel-dir", directory, source)
    (built,) = directory.glob("*.whl")
    return built


def pip(cwd: Path, command: str, *arguments: object) -> None:
    words = [sys.executable, "-m", "pip", "--disable-pip-version-check", command, "--no-deps", "--no-index"]
    done = subprocess.run([*words, *map(str, arguments)], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


class Installation:
    """The wheel in a directory of its own, before everything else that Python finds."""

    def __init__(self, directory: Path, elsewhere: Path) -> None:
        self.directory, self.elsewhere = directory, elsewhere
        kept = {key: os.environ[key] for key in ("PATH", "LD_LIBRARY_PATH", "SYSTEMROOT") if key in os.environ}
        private = dict.fromkeys(("HOME", "XDG_CACHE_HOME", "HF_HOME"), str(elsewhere / "home"))
        threads = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        self.environment = {**kept, **private, **threads, "PYTHONPATH": str(directory), "PYTHONNOUSERSITE": "1"}

    def run(self, *words: object) -> subprocess.CompletedProcess:
        """Run a command in an empty directory; it knows of the installation, not of the checkout."""
        command = [str(word) for word in words]
        workplace = self.elsewhere / "empty"
        return subprocess.run(command, cwd=workplace, env=self.environment, capture_output=True, text=True, timeout=280)

    def python(self, *words: object) -> subprocess.CompletedProcess:
        return self.run(sys.executable, *words)

    def photon_train(self, *words: object) -> subprocess.CompletedProcess:
        """The console script."""
        return self.run(self.directory / "bin" / "photon-train", *words)


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Installation:
    directory = tmp_path_factory.mktemp("installed")
    pip(directory, "install", "--target", directory / "site", wheel)
    for name in ("home", "empty"):
        (directory / name).mkdir()
    found = Installation(directory / "site", directory)
    # The checkout may be installed in this Python, too: the wheel must be what is imported.
    code = "".join(f"import {name}; print({name}.__file__);" for name in PACKAGES)
    done = found.python("-c", code)
    assert done.stdout.split() == [str(directory / "site" / name / "__init__.py") for name in PACKAGES], done.stderr
    return found


def test_the_wheel_has_all_packages_whole_and_nothing_else(wheel) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == set().union(*map(files_of, PACKAGES.values()))
    assert {"photon_train/commands/demo.yaml", "photon_train/models/modeling_photon.py"} <= names


def test_the_console_script_lists_its_commands(installed) -> None:
    done = installed.photon_train("--help")
    assert done.returncode == 0, done.stderr
    assert all(f"\n  {name} " in done.stdout for name in COMMANDS)
    assert installed.photon_train("--version").stdout == f"photon-train {__version__}\n"
    done = installed.photon_train("covnert")
    assert done.returncode == 2 and done.stderr.startswith("error: unknown command 'covnert': did you mean 'convert'?")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name, installed) -> None:
    done = installed.photon_train(name, "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: photon-train {name} ")


@pytest.fixture(scope="module")
def arguments(tmp_path_factory) -> list[object]:
    """A tiny checkpoint, a text, and settings that are done with them in seconds."""
    directory = tmp_path_factory.mktemp("input")
    (directory / "text").mkdir()
    for index in range(8):
        lines = "\n".join(f"line {i * index % 7} of a text" for i in range(40))
        (directory / "text" / f"{index}.txt").write_text(lines)
    dense = tiny_checkpoint(directory / "dense")
    settings = {"model": dense, "data": directory / "text", **SETTINGS}
    return [word for key, value in settings.items() for word in (f"--{key}", value)]


@pytest.mark.slow
def test_a_dry_run_in_one_process_plans_and_writes_nothing(installed, arguments, tmp_path) -> None:
    done = installed.photon_train("convert", *arguments, "--output", tmp_path / "out", "--dry-run")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Training memory per process" in done.stdout and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_launched_conversion_trains_and_its_export_generates(installed, arguments, tmp_path) -> None:
    output = tmp_path / "out"
    launch = ["-m", "accelerate.commands.launch", "--quiet", "--cpu", "--num_processes", 1, "--num_machines", 1]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "-m", "photon_train.commands.convert"]
    done = installed.python(*launch, *arguments, "--output", output)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((output / "report.json").read_text())
    assert report["tuned_ce"] < report["converted_ce"]
    # The export ships the model's code, as the wheel has it.
    shipped = {path.name: path.read_bytes() for path in (output / "export").glob("*.py")}
    assert "modeling_photon.py" in shipped
    for name, content in shipped.items():
        assert content == (installed.directory / "photon_train" / "models" / name).read_bytes()
    done = installed.photon_train(
        *("generate", "--model", output / "export", "--prompt", "line 3 of", "--max-new-tokens", 4, "--device", "cpu")
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("--- line 3 of\n") and "1 x up to 4 tokens" in done.stdout
