"""Experiment tracking through accelerate's trackers. It never asks anything and never stops a run for a login."""

from __future__ import annotations

import importlib.util
import json
import logging
import netrc
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from accelerate import Accelerator

from photon_train.config import WANDB_MODES, RunConfig, TrackingSettings
from photon_train.errors import PhotonError
from photon_train.files import atomic_write_text
from photon_train.training.settings import flat_config

logger = logging.getLogger(__name__)

TRACKERS = {"wandb": ("wandb",), "tensorboard": ("tensorboard", "tensorboardX"), "none": ()}
_TRUE = ("1", "on", "yes", "true")
RUN_IDS_FILE = "tracking.json"


def require_tracker(settings: TrackingSettings) -> str | None:
    """The name that accelerate knows the chosen tracker by, or None for `none`.

    Raises:
        PhotonError: for a tracker that is not installed, or W&B settings that cannot work.
    """
    packages = TRACKERS[settings.tracker]
    if packages and not any(importlib.util.find_spec(package) for package in packages):
        raise PhotonError(
            f"tracking.tracker={settings.tracker} needs the package {packages[-1]}: pip install 'photon-train[train]', "
            "or set tracking.tracker=none"
        )
    if settings.tracker == "wandb":
        wandb_mode(settings)
    return None if settings.tracker == "none" else settings.tracker


def has_wandb_key() -> bool:
    """Whether the environment or netrc holds credentials for W&B.

    W&B's own `login(prompt=False)` is not asked: it contacts the server.
    """
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").netloc
    candidates = [os.environ.get("NETRC"), "~/.netrc", "~/_netrc"]
    path = next((path for name in candidates if name and (path := Path(name).expanduser()).is_file()), None)
    if path is None:
        return False
    try:
        entry = netrc.netrc(path).authenticators(host)
    except (netrc.NetrcParseError, OSError):
        return False
    return bool(entry and entry[2])


def wandb_mode(settings: TrackingSettings) -> str:
    """The W&B mode of a run: the setting, else WANDB_MODE, else online with a key and offline without.

    WANDB_DISABLED, which transformers' Trainer heeds, is WANDB_MODE=disabled where that is not set.

    Raises:
        PhotonError: for an unknown mode in WANDB_MODE, or `online` without a key (W&B would ask for one).
    """
    source, mode = "tracking.mode", settings.mode
    if mode == "auto":
        is_disabled = os.environ.get("WANDB_DISABLED", "").lower() in _TRUE
        source, mode = "WANDB_MODE", os.environ.get("WANDB_MODE") or ("disabled" if is_disabled else "auto")
    if mode == "auto":
        return "online" if has_wandb_key() else "offline"
    if mode not in WANDB_MODES:
        raise PhotonError(f"{source}={mode!r} is not one of {', '.join(WANDB_MODES)}")
    if mode == "online" and not has_wandb_key():
        raise PhotonError(f"{source}=online needs a key: set WANDB_API_KEY or run `wandb login`, or choose offline")
    return mode


def _init_kwargs(config: RunConfig, output_dir: Path, name: str, start_step: int) -> dict[str, Any]:
    settings = config.tracking
    if settings.tracker == "tensorboard":
        # A resumed run writes a second file into the same curve; what the killed one wrote after the checkpoint goes.
        return {"tensorboard": {"purge_step": start_step + 1}} if start_step else {}
    if settings.tracker != "wandb":
        return {}
    return {
        "wandb": {
            "mode": wandb_mode(settings),
            "dir": str(output_dir),
            "name": f"{settings.run_name}-{name}" if settings.run_name else None,
            "group": settings.group,
            "job_type": name,
            # A second training in this process is a second run.
            "reinit": "finish_previous",
            **run_identity(output_dir, name, config.resume),
        }
    }


def in_sweep() -> bool:
    """Whether the agent of a W&B sweep has started this process; it sets the variable."""
    return bool(os.environ.get("WANDB_SWEEP_ID"))


def run_identity(output_dir: Path, name: str, resume: bool) -> dict[str, Any]:
    """Arguments of `wandb.init` that choose the run: in a sweep its agent has chosen already."""
    return {} if in_sweep() else {"id": _run_id(output_dir, name, resume), "resume": "allow"}


def _run_id(output_dir: Path, name: str, resume: bool) -> str:
    """The W&B run that the training `name` belongs to: the one of the attempt before, or a new one."""
    path = output_dir / RUN_IDS_FILE
    try:
        ids = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        ids = {}
    if not (resume and name in ids):
        ids[name] = uuid.uuid4().hex[:8]
        atomic_write_text(path, json.dumps(ids, indent=1) + "\n")
    return ids[name]


@contextmanager
def tracked(
    accelerator: Accelerator,
    config: RunConfig,
    output_dir: Path,
    name: str,
    extra: dict[str, Any] | None = None,
    start_step: int = 0,
) -> Iterator[None]:
    """Track what `log_metrics` gets in the block as one run of the chosen tracker.

    A resumed training continues the run of the attempt before. Steps that the tracker has seen already are not shown
    twice: their values are the same.

    Args:
        accelerator: From `make_accelerator`.
        config: Logged as the run's configuration.
        output_dir: Where W&B and tensorboard write.
        name: What is trained (`photon`, `dense`): part of the run's name and W&B's job type. In a sweep, whose agent
            expects one run per process, the dense comparison is not tracked.
        extra: More keys of the run's configuration, such as the KV ratio.
        start_step: Step that a resumed training goes on from.

    Raises:
        PhotonError: if the tracker cannot start.
    """
    if in_sweep() and name == "dense":
        yield
        return
    rows = {**flat_config(config), **(extra or {}), "stage": name}
    # tensorboard's table of hyperparameters takes scalars only.
    rows = {
        key: value if isinstance(value, (bool, int, float, str)) else json.dumps(value) for key, value in rows.items()
    }
    project = config.tracking.project if config.tracking.tracker == "wandb" else name
    output_dir.mkdir(parents=True, exist_ok=True)
    try:
        kwargs = _init_kwargs(config, output_dir, name, start_step) if accelerator.is_main_process else {}
        accelerator.init_trackers(project, config=rows, init_kwargs=kwargs)
    except PhotonError:
        raise
    except Exception as error:  # trackers raise what they like: no network, no project, a bad key
        raise PhotonError(
            f"tracking.tracker={config.tracking.tracker} cannot start: {_first_line(error)}; set tracking.mode=offline "
            "or tracking.tracker=none"
        ) from error
    try:
        yield
    finally:
        # `accelerator.end_training` would also take the process group down.
        for tracker in accelerator.trackers:
            try:
                tracker.finish()
            except Exception as error:
                logger.warning("the tracker %s did not finish: %s", tracker.name, _first_line(error))
        accelerator.trackers.clear()


def log_metrics(accelerator: Accelerator, values: dict[str, Any], step: int) -> None:
    """Give `values` to the trackers. One that fails is dropped with a warning: the run and `metrics.jsonl` go on."""
    for tracker in list(accelerator.trackers):
        try:
            tracker.log(values, step=step)
        except Exception as error:
            accelerator.trackers.remove(tracker)
            logger.warning(
                "the tracker %s failed at step %d and is left out from here on: %s; metrics.jsonl has everything",
                tracker.name,
                step,
                _first_line(error),
            )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def alert(accelerator: Accelerator, title: str, text: str) -> None:
    """Tell who follows the run, where the tracker can: W&B sends mail or Slack, at most once in five minutes."""
    if accelerator.is_main_process:
        for tracker in accelerator.trackers:
            if tracker.name == "wandb":
                try:
                    tracker.tracker.alert(title=title, text=text, level="WARN", wait_duration=300)
                except Exception as error:
                    logger.warning("the tracker could not send %r: %s", title, _first_line(error))
