"""Every configuration file in the repository is read by what reads it in use."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from photon_train.config import load_config

ROOT = Path(__file__).resolve().parents[1]
ACCELERATE = {path.stem: path for path in sorted((ROOT / "accelerate_configs").glob("*.yaml"))}
NAMES = ["cpu", "single_gpu", "zero2", "zero3", "zero3_offload", "multi_node", "cpu_zero2", "cpu_zero3"]


def launch_arguments(path: Path):
    """What `accelerate launch --config_file path` makes of the file."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    arguments = launch_command_parser().parse_args(["--config_file", str(path), "script.py"])
    return _validate_launch_command(arguments)[0]


def test_the_named_files_exist() -> None:
    assert set(ACCELERATE) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_accelerate_reads_the_file(name: str) -> None:
    arguments = launch_arguments(ACCELERATE[name])
    content = yaml.safe_load(ACCELERATE[name].read_text())
    assert arguments.use_deepspeed == (content["distributed_type"] == "DEEPSPEED")
    assert arguments.num_processes == content["num_processes"]
    for key, value in content.get("deepspeed_config", {}).items():
        assert getattr(arguments, key) == value, "accelerate knows the key and takes the value"


@pytest.mark.parametrize("name", [name for name in NAMES if "zero" in name or name == "multi_node"])
def test_deepspeed_takes_the_run_s_batch_and_accumulation(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A number in the file would silently win over the run's own settings."""
    from accelerate.utils import DeepSpeedPlugin
    from accelerate.utils.launch import prepare_deepspeed_cmd_env

    arguments = launch_arguments(ACCELERATE[name])
    arguments.deepspeed_fields_from_accelerate_config = ""  # the launcher adds this just before the call
    arguments.machine_rank = 1  # only machine 0 asks whether the port is free, which is no matter here
    _, environment = prepare_deepspeed_cmd_env(arguments)
    assert "ACCELERATE_GRADIENT_ACCUMULATION_STEPS" not in environment
    for key, value in environment.items():
        if key.startswith("ACCELERATE_"):
            monkeypatch.setenv(key, value)
    plugin = DeepSpeedPlugin()
    assert plugin.zero_stage == (2 if "zero2" in name else 3)
    assert plugin.deepspeed_config["gradient_accumulation_steps"] == "auto"
    assert plugin.deepspeed_config["gradient_clipping"] == "auto"
    assert plugin.deepspeed_config["train_micro_batch_size_per_gpu"] == "auto"
    assert plugin.zero3_init_flag is False
    offload = plugin.deepspeed_config["zero_optimization"]["offload_optimizer"]["device"]
    assert offload == ("cpu" if name == "zero3_offload" else "none")


def test_every_run_configuration_is_read() -> None:
    files = sorted((ROOT / "photon_train" / "commands").glob("*.yaml"))
    assert files
    for path in files:
        load_config(["--config", str(path)], prog="recipe.py", description="")
