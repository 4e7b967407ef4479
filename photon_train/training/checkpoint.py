"""Checkpoints: what training needs to go on, complete or absent, and refused by a run that computes otherwise.

A checkpoint holds the trained parameters, optimiser, schedule and random generators, as accelerate and DeepSpeed
write them. Frozen weights are not stored: they come from the converted model. With several machines the output
directory must be one that all of them share.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast_object_list
from safetensors import safe_open

from photon_train.config import RunConfig
from photon_train.errors import PhotonError
from photon_train.files import atomic_directory, atomic_write_text
from photon_train.training.settings import binding_settings, settings_hash

STATE_FILE = "training_state.json"
_WEIGHTS_FILE = "model.safetensors"
_STEP = re.compile(r"step_(\d+)")


@dataclass
class TrainingState:
    """Where a run stands.

    Attributes:
        step: Optimiser steps done; also the position in the data.
        tokens: Tokens read.
        seconds: Time spent in training so far, evaluations included.
        initial_ce: Held-out cross-entropy before the first step.
        metrics: The last value of every metric.
        settings: What the run computes (`run_settings`).
        settings_hash: Its hash.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    initial_ce: float = math.nan
    metrics: dict[str, float] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    settings_hash: str = ""


def run_settings(config: RunConfig, name: str, num_processes: int, num_sequences: int) -> dict[str, Any]:
    """Everything that must be equal for a continued run to be the same run."""
    return {**binding_settings(config), "name": name, "num_processes": num_processes, "num_sequences": num_sequences}


def checkpoint_dir(output_dir: Path, name: str) -> Path:
    """Folder of the checkpoints of one training."""
    return Path(output_dir) / "checkpoints" / name


def _checkpoints(directory: Path) -> list[Path]:
    """Complete checkpoints in `directory`, oldest first."""
    found = [(int(match[1]), path) for path in directory.glob("step_*") if (match := _STEP.fullmatch(path.name))]
    return [path for _, path in sorted(found) if (path / STATE_FILE).is_file()]


def latest_checkpoint(directory: str | Path) -> Path | None:
    """The newest complete checkpoint under `directory` (see `checkpoint_dir`), or None."""
    found = _checkpoints(Path(directory))
    return found[-1] if found else None


def _frozen_names(model) -> set[str]:
    aliases = list(model.named_parameters(remove_duplicate=False))
    trained = {id(parameter) for _, parameter in aliases if parameter.requires_grad}
    return {name for name, parameter in aliases if id(parameter) not in trained}


@contextmanager
def _without_frozen_weights(accelerator: Accelerator) -> Iterator[None]:
    def drop(models: list, weights: list[dict], _directory: str) -> None:
        for model, state in zip(models, weights, strict=True):
            for name in _frozen_names(model) & set(state):
                del state[name]

    # DeepSpeed writes the weights itself and is told so by an argument.
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        yield
        return
    handle = accelerator.register_save_state_pre_hook(drop)
    try:
        yield
    finally:
        handle.remove()


def save_checkpoint(accelerator: Accelerator, directory: Path, state: TrainingState, keep: int) -> Path:
    """Write `<directory>/step_<step>` and remove all but the newest `keep`. Every process must call it.

    The files are written to a hidden sibling, `training_state.json` last, and the folder is then renamed.
    """
    path = directory / f"step_{state.step:06d}"
    is_deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
    with ExitStack() as stack:
        shared = [str(stack.enter_context(atomic_directory(path))) if accelerator.is_main_process else None]
        broadcast_object_list(shared)
        with _without_frozen_weights(accelerator):
            accelerator.save_state(shared[0], **({"exclude_frozen_parameters": True} if is_deepspeed else {}))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            atomic_write_text(Path(shared[0]) / STATE_FILE, json.dumps(asdict(state), indent=2) + "\n")
    if accelerator.is_main_process:
        for old in _checkpoints(directory)[: -max(1, keep)]:
            shutil.rmtree(old)
        for abandoned in directory.glob(".step_*"):
            shutil.rmtree(abandoned)
    accelerator.wait_for_everyone()
    return path


def read_state(path: Path, settings: dict[str, Any]) -> TrainingState:
    """Read a checkpoint's state and check that it belongs to the run with `settings` (`run_settings`).

    Raises:
        PhotonError: if a setting differs (each is named with both values) or the file cannot be read.
    """
    file = path / STATE_FILE
    try:
        state = TrainingState(**json.loads(file.read_text(encoding="utf-8")))
    except (OSError, TypeError, ValueError) as error:
        raise PhotonError(
            f"{file} cannot be read ({error}): remove {path} to resume from an older checkpoint"
        ) from error
    if state.settings_hash != settings_hash(settings):
        known = json.loads(json.dumps(settings))
        missing = object()
        differing = [
            f"{key} (checkpoint: {state.settings.get(key)!r}, now: {known.get(key)!r})"
            for key in sorted({*state.settings, *known})
            if state.settings.get(key, missing) != known.get(key, missing)
        ]
        raise PhotonError(
            f"cannot resume from {path}: {'; '.join(differing)}. Restore these settings, or choose another output"
        )
    return state


def load_checkpoint(accelerator: Accelerator, path: Path) -> None:
    """Restore what `save_checkpoint` stored into the objects that `accelerator` has prepared.

    Raises:
        PhotonError: if a trained parameter is not in the checkpoint or has another shape.
    """
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        accelerator.load_state(str(path), load_module_strict=False)
        return
    with safe_open(path / _WEIGHTS_FILE, framework="pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    for model in accelerator._models:
        names: dict[int, set[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if parameter.requires_grad:
                names.setdefault(id(parameter), set()).add(name)
        for name, parameter in model.named_parameters():
            stored = names.get(id(parameter), set()) & set(shapes)
            if parameter.requires_grad and {shapes[alias] for alias in stored} != {tuple(parameter.shape)}:
                raise PhotonError(
                    f"{path / _WEIGHTS_FILE} does not fit the model: {name} is missing or has another shape; "
                    "resume with the model that was trained"
                )
    accelerator.load_state(str(path), strict=False)
