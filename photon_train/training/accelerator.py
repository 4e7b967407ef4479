"""The Accelerator of a run: devices, processes, precision, DeepSpeed and trackers."""

from __future__ import annotations

import logging
import os
import warnings
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, InitProcessGroupKwargs, ProjectConfiguration

from photon_train.config import RunConfig
from photon_train.data.pretrain import fast_dtype
from photon_train.errors import PhotonError
from photon_train.training.base_bits import check_machine
from photon_train.training.tracking import require_tracker

logger = logging.getLogger(__name__)

# The main process tokenises, probes, converts, exports and checks while the others wait at a collective, which NCCL
# would give up after 10 minutes. A process that dies ends the others through the launcher, long before.
PATIENCE = timedelta(hours=6)


def resolve_precision(name: str) -> str:
    """``no``, ``bf16`` or ``fp16`` for a `train.mixed_precision`, whose ``auto`` depends on this machine."""
    if name != "auto":
        return name
    device = torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"
    return "bf16" if fast_dtype(torch.device(device)) is torch.bfloat16 else "no"


def make_accelerator(config: RunConfig, output_dir: str | os.PathLike[str]) -> Accelerator:
    """Set up the processes of `accelerate launch` (or the one process of plain python) for `config`.

    One Accelerator serves several `train` calls one after the other; each call releases what the call before
    prepared. DeepSpeed's "auto" values and its accumulation and clipping come from `config`.

    transformers would load every model sharded once a ZeRO-3 plugin exists, which all processes must do together; the
    main process loads some alone (calibration, export) and would wait for ever. That is switched off: what is trained
    is sharded by `shards.shard`.

    Raises:
        PhotonError: for a precision that the hardware or the accelerate config cannot serve, a way to divide the work
            other than DDP and ZeRO, more processes than GPUs, a DeepSpeed that cannot be imported, or a tracker that is
            not installed; for `train.base_bits` as `check_machine`.
    """
    train, precision = config.train, resolve_precision(config.train.mixed_precision)
    on_cpu = not torch.accelerator.is_available()
    if on_cpu and precision == "fp16":
        raise PhotonError("train.mixed_precision=fp16 needs a GPU: choose bf16 or no")
    state = AcceleratorState._shared_state
    if state and state.get("_mixed_precision") not in (None, precision):
        raise PhotonError(
            f"train.mixed_precision={precision!r}, but this process already runs an Accelerator with "
            f"{state['_mixed_precision']!r}: use one precision per process"
        )
    uses_deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    is_launched = int(os.environ.get("LOCAL_RANK", -1)) != -1
    _check_strategy()
    _check_machine(on_cpu, uses_deepspeed)
    if on_cpu and uses_deepspeed:
        _use_gloo_alone()
    device = torch.device("cpu") if on_cpu else torch.accelerator.current_accelerator()
    check_machine(train, device, int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")) if uses_deepspeed else 0)
    tracker = require_tracker(config.tracking)
    output_dir = Path(output_dir)
    accelerator = Accelerator(
        mixed_precision=precision,
        gradient_accumulation_steps=train.gradient_accumulation_steps,
        # Without a GPU only the explicit CPU mode joins the processes; DeepSpeed joins them itself.
        cpu=on_cpu and not uses_deepspeed,
        kwargs_handlers=[_process_group(on_cpu)] if is_launched else None,
        log_with=tracker,
        project_config=ProjectConfiguration(project_dir=str(output_dir), logging_dir=str(output_dir / "tensorboard")),
        # The schedule counts optimiser steps; accelerate would step it once per process.
        step_scheduler_with_optimizer=False,
    )
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        _fill_deepspeed(accelerator, config)
    return accelerator


def _process_group(on_cpu: bool) -> InitProcessGroupKwargs:
    """How the processes join: over gloo without GPUs, and patient while the main one works alone."""
    return InitProcessGroupKwargs(timeout=PATIENCE, **({"backend": "gloo"} if on_cpu else {}))


def _check_strategy() -> None:
    """Refuse what accelerate offers beside DDP and ZeRO: it would run, and compute something else."""
    for name, key in (("sequence", "SP"), ("context", "CP"), ("tensor", "TP")):
        size = os.environ.get(f"PARALLELISM_CONFIG_{key}_SIZE", "1")
        if size != "1":
            raise PhotonError(
                f"the accelerate config asks for {name} parallelism (parallelism_config_{key.lower()}_size: {size}), "
                "which PHOTON's attention cannot be cut up for: set it to 1. For long contexts take "
                "train.gradient_checkpointing and accelerate_configs/zero3.yaml (docs/training.md)"
            )
    for name in ("FSDP", "MEGATRON_LM"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true":
            raise PhotonError(
                f"the accelerate config asks for {name}, whose checkpoints and exports are not supported: take "
                "accelerate_configs/zero3.yaml, which shards the same"
            )


def _check_machine(on_cpu: bool, uses_deepspeed: bool) -> None:
    """What an accelerate config asks for and this machine does not have, in one line and before the processes join."""
    asks_for_gpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "false"
    if on_cpu and asks_for_gpu and os.environ.get("DS_ACCELERATOR") != "cpu" and os.environ.get("RANK", "0") == "0":
        logger.warning(
            "no GPU is visible, so this runs on the CPU. If the machine has one: is torch (%s) built for it, and does "
            "CUDA_VISIBLE_DEVICES name it? If not: accelerate_configs/cpu.yaml",
            torch.__version__,
        )
    processes, devices = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 0 if on_cpu else torch.accelerator.device_count()
    if not on_cpu and processes > devices:
        raise PhotonError(
            f"{processes} processes were started on this machine and {devices} GPUs are visible: set num_processes in "
            "the accelerate config, or pass --num_processes to `accelerate launch` (it counts those of all machines)"
        )
    if uses_deepspeed:
        try:
            import deepspeed  # noqa: F401
        except Exception as error:  # not only ImportError: it looks for compilers and toolkits while it is imported
            reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
            raise PhotonError(
                f"the accelerate config asks for DeepSpeed, which cannot be imported ({reason}): pip install "
                "'photon-train[train]'; where it misses CUDA_HOME, set that to the directory of the CUDA toolkit, or "
                "take accelerate_configs/single_gpu.yaml"
            ) from error


def _use_gloo_alone() -> None:
    """Keep DeepSpeed from compiling its shared-memory collectives for CPU processes.

    They need a C++ compiler and minutes, and a build that is killed leaves a lock on which later runs wait for ever.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _fill_deepspeed(accelerator: Accelerator, config: RunConfig) -> None:
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    settings = accelerator.deepspeed_plugin.deepspeed_config
    settings["train_micro_batch_size_per_gpu"] = config.train.batch_size
    settings["gradient_accumulation_steps"] = config.train.gradient_accumulation_steps
    settings["train_batch_size"] = (
        config.train.batch_size * config.train.gradient_accumulation_steps * accelerator.num_processes
    )
    settings["gradient_clipping"] = config.train.max_grad_norm
    # DeepSpeed's own choice is 5e8 elements, allocated whatever there is to reduce; "auto" takes hidden size squared.
    settings["zero_optimization"].setdefault("reduce_bucket_size", "auto")
    unset_hf_deepspeed_config()
    # DeepSpeed 0.19 calls collectives that torch 2.13 has renamed; one warning per call and process hides the log.
    warnings.filterwarnings("ignore", message="`torch.distributed", category=FutureWarning)
