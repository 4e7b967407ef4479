"""Trackers: real offline W&B and tensorboard runs, the choice of the mode, and what is said when nothing can work."""

from __future__ import annotations

import importlib.util
import json
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_training import tiny_data, tiny_model, tiny_run

from photon_train.config import HubSettings, TrackingSettings
from photon_train.errors import PhotonError
from photon_train.training.loop import train
from photon_train.training.lora import add_lora
from photon_train.training.tracking import require_tracker, wandb_mode

METRICS = {
    "train/loss",
    "train/ce",
    "train/learning_rate",
    "train/grad_norm",
    "train/tokens_per_second",
    "eval/ce",
    "eval/perplexity",
    "kv_ratio",
}


def _train(tracking: TrackingSettings, output: Path, name: str = "photon"):
    config = tiny_run(max_steps=4, eval_every=2, save_every=0)
    config.tracking, config.hub = tracking, HubSettings(token="hf_secret")
    student = add_lora(tiny_model("llama"), config.lora)
    return train(student, tiny_data(8), tiny_data(3), config, output, name=name, extra_log={"kv_ratio": 0.0625})


def _wandb_records(file: Path) -> Iterator:
    """The records of an offline run: protocol buffers in a LevelDB log (blocks of 32 KiB, chunks with a header)."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, parts = file.read_bytes(), 7, b""
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        _checksum, length, kind = struct.unpack_from("<IHB", data, position)
        if kind == 0:
            break
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            record = Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


@pytest.fixture
def no_key(monkeypatch, tmp_path):
    for variable in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_DIR"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    return tmp_path


def test_two_trainings_are_two_offline_wandb_runs(no_key):
    settings = TrackingSettings(project="tiny", run_name="first", group="pair")
    results = {name: _train(settings, no_key / "out", name) for name in ("dense", "photon")}
    runs = {}
    for file in (no_key / "out" / "wandb").glob("offline-run-*/run-*.wandb"):
        records = list(_wandb_records(file))
        run = next(record.run for record in records if record.WhichOneof("record_type") == "run")
        assert (run.project, run.display_name, run.run_group) == ("tiny", f"first-{run.job_type}", "pair")
        assert b"hf_secret" not in file.read_bytes()
        runs[run.job_type] = records
    assert runs.keys() == results.keys()
    for name, records in runs.items():
        result = results[name]
        history: dict[str, list] = {}
        config: dict[str, str] = {}
        for record in records:
            for item in record.history.item:
                history.setdefault(item.key or "/".join(item.nested_key), []).append(json.loads(item.value_json))
            for source in (record.config, record.run.config):
                config.update({item.key or ".".join(item.nested_key): item.value_json for item in source.update})
        assert METRICS <= history.keys()
        assert history["train/loss"] == [r["train/loss"] for r in result.history if "train/loss" in r]
        assert history["eval/ce"] == [r["eval/ce"] for r in result.history if "eval/ce" in r]
        assert json.loads(config["train.max_steps"]) == 4 and json.loads(config["kv_ratio"]) == 0.0625


def test_tensorboard_writes_events(tmp_path):
    _train(TrackingSettings(tracker="tensorboard"), tmp_path)
    (events, *_) = (tmp_path / "tensorboard" / "photon").glob("events.out.tfevents.*")
    assert all(key.encode() in events.read_bytes() for key in METRICS)
    assert not (tmp_path / "wandb").exists()


def test_mode_follows_setting_then_environment_then_key(no_key, monkeypatch):
    assert wandb_mode(TrackingSettings()) == "offline"
    assert wandb_mode(TrackingSettings(mode="disabled")) == "disabled"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert wandb_mode(TrackingSettings()) == "disabled"
    assert wandb_mode(TrackingSettings(mode="offline")) == "offline"
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert wandb_mode(TrackingSettings()) == "online"


def test_mode_is_online_with_a_key_in_netrc(no_key):
    (no_key / "netrc").write_text(f"machine api.wandb.ai\n  login user\n  password {'0' * 40}\n")
    assert wandb_mode(TrackingSettings()) == "online"


@pytest.mark.parametrize(
    "settings, environment, message",
    [
        (TrackingSettings(mode="online"), None, "tracking.mode=online needs a key: set WANDB_API_KEY"),
        (TrackingSettings(), "online", "WANDB_MODE=online needs a key"),
        (TrackingSettings(mode="sometimes"), None, "tracking.mode='sometimes' is not one of auto, online"),
        (TrackingSettings(tracker="notebook"), None, "tracking.tracker='notebook' is not one of wandb, tensorboard"),
    ],
)
def test_settings_that_cannot_work_are_named(settings, environment, message, no_key, monkeypatch):
    if environment:
        monkeypatch.setenv("WANDB_MODE", environment)
    with pytest.raises(PhotonError, match=message):
        require_tracker(settings)


@pytest.mark.parametrize("tracker", ["wandb", "tensorboard"])
def test_a_missing_package_names_what_to_install(tracker, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(PhotonError, match=r"photon-train\[train\].*tracking.tracker=none"):
        require_tracker(TrackingSettings(tracker=tracker))
    assert require_tracker(TrackingSettings(tracker="none")) is None
