"""ZeRO checkpoints read by another number of processes, through DeepSpeed's universal format."""

from __future__ import annotations

import contextlib
import copy
import io
import shutil
from pathlib import Path
from types import SimpleNamespace

from accelerate import Accelerator
from accelerate.utils import MODEL_NAME, SCHEDULER_NAME, broadcast_object_list

from photon_train.errors import PhotonError
from photon_train.files import hidden_sibling


def load_resharded(accelerator: Accelerator, checkpoint: Path) -> None:
    """Load weights, optimiser and schedule of a ZeRO checkpoint that so many processes did not write.

    The main process writes every parameter and its moments whole into a hidden folder beside the checkpoint (three fp32
    tensors for each trained one), all read their share of it, and it is removed. Every process must call it.

    Raises:
        PhotonError: if the folder cannot be written, or DeepSpeed cannot convert the checkpoint.
    """
    answer: list = [None, None]
    if accelerator.is_main_process:
        universal = hidden_sibling(checkpoint)
        try:
            _convert(checkpoint / MODEL_NAME, universal / MODEL_NAME)
            shutil.copy(checkpoint / f"{SCHEDULER_NAME}.bin", universal)
            answer[0] = str(universal)
        except Exception as error:  # DeepSpeed raises many unrelated types here
            shutil.rmtree(universal, ignore_errors=True)
            answer[1] = (
                f"{checkpoint} cannot be turned into one for {accelerator.num_processes} processes "
                f"({' '.join(str(error).split())[:300] or repr(error)}): see that the disk has room, or resume with as "
                "many processes as before"
            )
    broadcast_object_list(answer)
    if answer[1] is not None:
        raise PhotonError(answer[1])
    try:
        _load(accelerator, answer[0])
        accelerator.wait_for_everyone()
    finally:
        if accelerator.is_main_process:
            shutil.rmtree(answer[0], ignore_errors=True)


def _convert(source: Path, target: Path) -> None:
    from deepspeed.checkpoint import ds_to_universal

    target.mkdir(parents=True)
    settings = SimpleNamespace(
        input_folder=str(source),
        output_folder=str(target),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        ds_to_universal.main(settings)


def _load(accelerator: Accelerator, universal: str) -> None:
    (engine,), (scheduler,) = accelerator._models, accelerator._schedulers
    groups = engine.optimizer.optimizer.param_groups
    settings = [{key: value for key, value in group.items() if key != "params"} for group in groups]
    engine._config.load_universal_checkpoint = True
    try:
        accelerator.load_state(universal, load_module_strict=False)
    finally:
        engine._config.load_universal_checkpoint = False
    # Stage 3 (DeepSpeed 0.19) gives every group the settings of the first, and all groups one step counter, which each
    # would then advance for the others.
    for group, own, rate in zip(groups, settings, scheduler.get_last_lr(), strict=True):
        group.update({**own, "lr": rate})
    for state in engine.optimizer.optimizer.state.values():
        state["step"] = copy.deepcopy(state["step"])
