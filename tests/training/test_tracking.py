"""Trackers: real offline W&B and tensorboard runs, the choice of the mode, and what is said when nothing can work."""

from __future__ import annotations

import importlib.util
import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_training import Poison, tiny_data, tiny_model, tiny_run

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


def _train(
    tracking: TrackingSettings, output: Path, name: str = "photon", resume: bool = False, on_step=None, **train_
):
    config = tiny_run(max_steps=4, eval_every=2, **{"save_every": 0, **train_})
    config.tracking, config.hub, config.resume = tracking, HubSettings(token="hf_secret"), resume
    student = add_lora(tiny_model("llama"), config.lora)
    if isinstance(on_step, dict):
        on_step = Poison(student, on_step)
    extra = {"kv_ratio": 0.0625}
    return train(student, tiny_data(8), tiny_data(3), config, output, name=name, extra_log=extra, on_step=on_step)


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
        if kind == 0 or position + 7 + length > len(data):
            break  # not written yet
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            record = Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def _finished_records(file: Path) -> list:
    """The records of a finished run; W&B's own process may write the last of them a moment after `finish` returns."""
    deadline = time.monotonic() + 30
    while True:
        records = list(_wandb_records(file))
        if any(record.WhichOneof("record_type") == "exit" for record in records):
            return records
        assert time.monotonic() < deadline, f"{file} never ended"
        time.sleep(0.1)


@pytest.fixture
def no_key(monkeypatch, tmp_path):
    for variable in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_DISABLED", "WANDB_DIR"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    return tmp_path


def test_two_trainings_are_two_offline_wandb_runs(no_key):
    settings = TrackingSettings(project="tiny", run_name="first", group="pair")
    results = {name: _train(settings, no_key / "out", name) for name in ("dense", "photon")}
    runs = {}
    for file in (no_key / "out" / "wandb").glob("offline-run-*/run-*.wandb"):
        records = _finished_records(file)
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


class Killed(Exception):
    """Stands for whatever ends a process."""


def _die_at(last: int):
    def on_step(step: int) -> None:
        if step == last:
            raise Killed

    return on_step


def _wandb_runs(output: Path) -> dict[Path, list]:
    return {file: _finished_records(file) for file in sorted((output / "wandb").glob("offline-run-*/run-*.wandb"))}


def _steps(records: list, key: str) -> list[int]:
    """The steps at which `key` was logged."""
    found = []
    for record in records:
        items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
        if key in items:
            found.append(json.loads(items["_step"]))
    return found


def test_a_resumed_training_continues_its_wandb_run(no_key):
    """Killed before its first checkpoint, then after one: all attempts carry one id, a new run has another."""
    settings, output = TrackingSettings(project="tiny"), no_key / "out"
    for resume, last in ((False, 1), (True, 3)):
        with pytest.raises(Killed):
            _train(settings, output, resume=resume, on_step=_die_at(last), save_every=2)
    _train(settings, output, resume=True, save_every=2)
    records = list(_wandb_runs(output).values())
    runs = [next(r.run for r in attempt if r.WhichOneof("record_type") == "run") for attempt in records]
    assert len(runs) == 3 and len({run.run_id for run in runs}) == 1
    assert [_steps(attempt, "train/loss") for attempt in records] == [[1], [1, 2, 3], [3, 4]]
    _train(settings, no_key / "other")
    (other,) = _wandb_runs(no_key / "other")
    assert runs[0].run_id not in other.name


def test_bad_steps_send_an_alert(no_key, monkeypatch):
    """Offline runs keep no alerts: what is handed to W&B is looked at."""
    import wandb

    alerts, send = [], wandb.Run.alert

    def recording(self, title, text, level=None, wait_duration=None):
        send(self, title, text, level, wait_duration)
        alerts.append((title, text))

    monkeypatch.setattr(wandb.Run, "alert", recording)
    with pytest.raises(PhotonError, match="diverged"):
        _train(TrackingSettings(), no_key / "out", on_step={2: "nan", 3: "nan"}, max_skipped_in_row=2)
    assert [title for title, _ in alerts] == ["Step skipped", "Training diverged"]
    assert "photon step 2: loss nan" in alerts[0][1] and "diverged at step 3" in alerts[1][1]


def test_a_tracker_that_dies_does_not_take_the_run_along(no_key, monkeypatch, caplog):
    from accelerate.tracking import WandBTracker

    log = WandBTracker.log

    def dying(self, values, step=None, **kwargs):
        if step >= 2:
            raise BrokenPipeError("[Errno 32] Broken pipe")
        log(self, values, step=step, **kwargs)

    monkeypatch.setattr(WandBTracker, "log", dying)
    result = _train(TrackingSettings(), no_key / "out")
    assert result.steps == 4 and len([r for r in result.history if "train/loss" in r]) == 4
    assert caplog.text.count("left out from here on: [Errno 32] Broken pipe") == 1


def test_a_tracker_that_cannot_start_is_one_error(no_key, monkeypatch):
    import wandb

    def refuse(**_):
        raise wandb.errors.CommError("no route to host\nand so on")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(PhotonError, match="wandb cannot start: no route to host; set tracking.mode=offline") as caught:
        _train(TrackingSettings(), no_key / "out")
    assert "\n" not in str(caught.value)


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


def test_the_variable_that_disables_it_for_transformers_does_so_here(no_key, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    for value, mode in (("true", "disabled"), ("1", "disabled"), ("false", "online"), ("", "online")):
        monkeypatch.setenv("WANDB_DISABLED", value)
        assert wandb_mode(TrackingSettings()) == mode, value
    monkeypatch.setenv("WANDB_DISABLED", "true")
    assert wandb_mode(TrackingSettings(mode="offline")) == "offline"
    monkeypatch.setenv("WANDB_MODE", "online")
    assert wandb_mode(TrackingSettings()) == "online"


def test_mode_is_online_with_a_key_in_netrc(no_key):
    (no_key / "netrc").write_text(f"machine api.wandb.ai\n  login user\n  password {'0' * 40}\n")
    assert wandb_mode(TrackingSettings()) == "online"


@pytest.mark.parametrize(
    "settings, environment, message",
    [
        (TrackingSettings(mode="online"), None, "tracking.mode=online needs a key: set WANDB_API_KEY"),
        (TrackingSettings(), "online", "WANDB_MODE=online needs a key"),
        (TrackingSettings(), "sometimes", "WANDB_MODE='sometimes' is not one of auto, online"),
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
