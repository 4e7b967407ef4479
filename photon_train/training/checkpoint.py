"""Checkpoints: what training needs to go on, complete or absent, and refused by a run that computes otherwise.

A checkpoint holds the trained parameters, optimiser, schedule and the random generators of every process, as
accelerate and DeepSpeed write them. Another number of processes can go on from it as long as the sequences per step
stay the same. Frozen weights are not stored: they come from the converted model. With several
machines the output directory must be one that all of them share.

The files are written under a hidden name, `manifest.json` with their hashes last; all is brought to the disk and the
folder then renamed. A process killed at any moment leaves complete checkpoints and hidden leftovers, which the next
run removes.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import RNG_STATE_NAME, DistributedType, broadcast_object_list, set_seed
from safetensors import SafetensorError, safe_open

from photon_train.config import RunConfig
from photon_train.data.packing import Sequences
from photon_train.errors import PhotonError
from photon_train.files import atomic_directory, atomic_write_text, hidden_sibling, remove_leftovers
from photon_train.manifest import FILE_NAME as MANIFEST
from photon_train.manifest import file_entries, package_versions, verify_manifest
from photon_train.training.reshard import load_resharded
from photon_train.training.settings import binding_settings, settings_hash

logger = logging.getLogger(__name__)

STATE_FILE = "training_state.json"
_WEIGHTS_FILE = "model.safetensors"
TRAINING_TEXT, HELD_OUT_TEXT = "hash of the training text", "hash of the held-out text"
_HASH_DIGITS = 16
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
        best_ce: Lowest held-out cross-entropy so far.
        best_step: The step it was reached at.
        guard: What the guard against loss spikes remembers (`GuardState`).
        num_processes: Processes that wrote the checkpoint.
        settings: What the run computes (`run_settings`).
        settings_hash: Its hash.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    initial_ce: float = math.nan
    metrics: dict[str, float] = field(default_factory=dict)
    best_ce: float = math.inf
    best_step: int = 0
    guard: dict[str, Any] = field(default_factory=dict)
    num_processes: int = 1
    settings: dict[str, Any] = field(default_factory=dict)
    settings_hash: str = ""


def run_settings(
    config: RunConfig, name: str, num_processes: int, text: dict[str, str], sharding: str = "none"
) -> dict[str, Any]:
    """Everything that must be equal for a continued run to be the same run (see `text_hashes`, `sharding_of`)."""
    return {**binding_settings(config, num_processes), **text, "name": name, "sharding": sharding}


def text_hashes(train_set: Sequences, eval_set: Sequences) -> dict[str, str]:
    """What tells the text of a run from any other."""
    found = zip((TRAINING_TEXT, HELD_OUT_TEXT), (train_set, eval_set), strict=True)
    return {key: dataset.content_hash()[:_HASH_DIGITS] for key, dataset in found}


def sharding_of(accelerator: Accelerator) -> str:
    """What decides about the files of a checkpoint: `none` (one process, DDP), or `zero1`, `zero2`, `zero3`."""
    plugin = accelerator.deepspeed_plugin
    return "none" if plugin is None else f"zero{plugin.zero_stage}"


def checkpoint_dir(output_dir: Path, name: str) -> Path:
    """Folder of the checkpoints of one training."""
    return Path(output_dir) / "checkpoints" / name


def _checkpoints(directory: Path) -> list[Path]:
    """Complete checkpoints in `directory`, oldest first."""
    found = [(int(match[1]), path) for path in directory.glob("step_*") if (match := _STEP.fullmatch(path.name))]
    return [path for _, path in sorted(found) if (path / MANIFEST).is_file()]


def latest_checkpoint(directory: str | Path) -> Path | None:
    """The newest complete checkpoint under `directory` (see `checkpoint_dir`), or None; files are not verified."""
    found = _checkpoints(Path(directory))
    return found[-1] if found else None


def usable_checkpoint(accelerator: Accelerator, directory: Path, keep: int) -> Path | None:
    """The newest checkpoint whose files are what its manifest says, or None where there is none at all.

    Leftovers of killed processes and checkpoints older than the newest `keep` are removed, and damaged ones passed
    over with a warning. Every process must call it; the main one looks and tells the others.

    Raises:
        PhotonError: if there are checkpoints and all of them are damaged: training would silently start anew.
    """
    answer: list[Any] = [None, None]
    if accelerator.is_main_process:
        remove_leftovers(directory)
        for path in reversed(_checkpoints(directory)):
            try:
                verify_manifest(path)
            except PhotonError as error:
                answer[1] = str(error).partition(": redo")[0]
                logger.warning("checkpoint passed over: %s", answer[1])
            else:
                answer[0] = str(path)
                _remove_old(directory, keep, newest=path)
                break
    broadcast_object_list(answer)
    if answer[0] is None and answer[1] is not None:
        raise PhotonError(f"no checkpoint in {directory} is whole: {answer[1]}; remove that folder to start anew")
    return None if answer[0] is None else Path(answer[0])


def _frozen_names(model) -> set[str]:
    aliases = list(model.named_parameters(remove_duplicate=False))
    trained = {id(parameter) for _, parameter in aliases if parameter.requires_grad}
    return {name for name, parameter in aliases if id(parameter) not in trained}


@contextmanager
def _without_frozen_weights(accelerator: Accelerator) -> Iterator[None]:
    def drop(models: list, weights: list[dict], _directory: str) -> None:
        for model, state in zip(models, weights, strict=True):
            frozen = _frozen_names(model)
            for name in list(state):
                # Under the name of a quantised weight lie its factors too.
                if name in frozen or name.partition(".weight.")[0] + ".weight" in frozen:
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

    Raises:
        PhotonError: if something cannot be written (a full disk, a directory that the machines do not share); the
            checkpoints before it stay.
    """
    path = directory / f"step_{state.step:06d}"
    is_deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
    try:
        with ExitStack() as stack:
            shared = [str(stack.enter_context(atomic_directory(path))) if accelerator.is_main_process else None]
            broadcast_object_list(shared)
            with _without_frozen_weights(accelerator):
                accelerator.save_state(shared[0], **({"exclude_frozen_parameters": True} if is_deepspeed else {}))
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                _finish(Path(shared[0]), state, accelerator.num_processes)
    except (OSError, RuntimeError, SafetensorError) as error:
        # torch and safetensors report a full disk as errors of their own.
        raise PhotonError(
            f"{path} cannot be written ({' '.join(str(error).split())[:300]}): see that the disk has room, then start "
            "the run again with --resume; earlier checkpoints are whole"
        ) from error
    if accelerator.is_main_process:
        _remove_old(directory, keep, newest=path)
    accelerator.wait_for_everyone()
    return path


def _remove_old(directory: Path, keep: int, newest: Path) -> None:
    """Remove the checkpoints before `newest` but for the last `keep - 1`."""
    checkpoints = _checkpoints(directory)
    for old in checkpoints[: max(0, checkpoints.index(newest) + 1 - keep)]:
        hidden = hidden_sibling(old)
        os.replace(old, hidden)  # a kill in the middle leaves no half of a checkpoint
        shutil.rmtree(hidden)


def _finish(directory: Path, state: TrainingState, num_processes: int) -> None:
    """Add the state and the manifest to what every process has written."""
    for process in range(num_processes):
        if not (directory / f"{RNG_STATE_NAME}_{process}.pkl").is_file():
            raise PhotonError(
                f"{directory.parent}: process {process} wrote its part of the checkpoint elsewhere; "
                "set output to a directory that all machines share"
            )
    atomic_write_text(directory / STATE_FILE, json.dumps(asdict(state), indent=2) + "\n")
    manifest = {"stage": "checkpoint", "versions": package_versions(), "files": file_entries(directory)}
    atomic_write_text(directory / MANIFEST, json.dumps(manifest, indent=2) + "\n")


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
        if any(state.settings.get(key) != known.get(key) for key in (TRAINING_TEXT, HELD_OUT_TEXT)):
            differing.append(
                "give the text that it was begun with (files were changed, added or removed, or a hub data set was)"
            )
        if state.settings.get("sharding") != known["sharding"]:
            differing.append("start it with the accelerate config that it was begun with")
        raise PhotonError(
            f"cannot resume from {path}: {'; '.join(differing)}. Restore these settings, or choose another output"
        )
    return state


def load_checkpoint(accelerator: Accelerator, path: Path, state: TrainingState, seed: int) -> None:
    """Restore what `save_checkpoint` stored into the objects that `accelerator` has prepared.

    Another number of processes than the one that wrote it shares the work in another way, and its random generators are
    seeded anew, by `seed`, step and process: losses then differ by rounding, and by dropout where there is any.

    Raises:
        PhotonError: if a trained parameter is not in the checkpoint or has another shape.
    """
    if state.num_processes == accelerator.num_processes:
        _load_state(accelerator, path)
        return
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        load_resharded(accelerator, path)
    else:
        _load_state(accelerator, path)
    set_seed((seed + 1_000_003 * (state.step + 1)) % 2**31, device_specific=True)


def _load_state(accelerator: Accelerator, path: Path) -> None:
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
