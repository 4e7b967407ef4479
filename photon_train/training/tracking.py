"""Experiment tracking through accelerate's trackers. It never asks anything and never stops a run for a login."""

from __future__ import annotations

import importlib.util
import json
import netrc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from accelerate import Accelerator

from photon_train.config import RunConfig, TrackingSettings
from photon_train.errors import PhotonError
from photon_train.training.settings import flat_config

TRACKERS = {"wandb": ("wandb",), "tensorboard": ("tensorboard", "tensorboardX"), "none": ()}
WANDB_MODES = ("online", "offline", "disabled")


def require_tracker(settings: TrackingSettings) -> str | None:
    """The name that accelerate knows the chosen tracker by, or None for `none`.

    Raises:
        PhotonError: for an unknown tracker, one that is not installed, or W&B settings that cannot work.
    """
    if settings.tracker not in TRACKERS:
        raise PhotonError(f"tracking.tracker={settings.tracker!r} is not one of {', '.join(TRACKERS)}")
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

    Raises:
        PhotonError: for an unknown mode, or `online` without a key (W&B would ask for one).
    """
    source, mode = "tracking.mode", settings.mode
    if mode == "auto":
        source, mode = "WANDB_MODE", os.environ.get("WANDB_MODE") or "auto"
    if mode == "auto":
        return "online" if has_wandb_key() else "offline"
    if mode not in WANDB_MODES:
        raise PhotonError(f"{source}={mode!r} is not one of auto, {', '.join(WANDB_MODES)}")
    if mode == "online" and not has_wandb_key():
        raise PhotonError(f"{source}=online needs a key: set WANDB_API_KEY or run `wandb login`, or choose offline")
    return mode


def _init_kwargs(config: RunConfig, output_dir: Path, name: str) -> dict[str, Any]:
    settings = config.tracking
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
        }
    }


@contextmanager
def tracked(
    accelerator: Accelerator, config: RunConfig, output_dir: Path, name: str, extra: dict[str, Any] | None = None
) -> Iterator[None]:
    """Track what `accelerator.log` gets in the block as one run of the chosen tracker.

    Args:
        accelerator: From `make_accelerator`.
        config: Logged as the run's configuration.
        output_dir: Where W&B and tensorboard write.
        name: What is trained (`photon`, `dense`): part of the run's name and W&B's job type.
        extra: More entries of the run's configuration, such as the KV ratio.
    """
    rows = {**flat_config(config), **(extra or {}), "stage": name}
    # tensorboard's table of hyperparameters takes scalars only.
    rows = {
        key: value if isinstance(value, (bool, int, float, str)) else json.dumps(value) for key, value in rows.items()
    }
    project = config.tracking.project if config.tracking.tracker == "wandb" else name
    output_dir.mkdir(parents=True, exist_ok=True)
    accelerator.init_trackers(project, config=rows, init_kwargs=_init_kwargs(config, output_dir, name))
    try:
        yield
    finally:
        # `accelerator.end_training` would also take the process group down.
        for tracker in accelerator.trackers:
            tracker.finish()
        accelerator.trackers.clear()


def alert(accelerator: Accelerator, title: str, text: str) -> None:
    """Tell who follows the run, where the tracker can: W&B sends mail or Slack, at most once in five minutes."""
    if accelerator.is_main_process:
        for tracker in accelerator.trackers:
            if tracker.name == "wandb":
                tracker.tracker.alert(title=title, text=text, level="WARN", wait_duration=300)
