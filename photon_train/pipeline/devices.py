"""Where the main process runs a whole model beside what training holds."""

from __future__ import annotations

from pathlib import Path

import torch

_ROOM = 1.5  # of the weights: activations, and the moments of a calibration


def roomy_device(device: torch.device, num_bytes: int) -> torch.device:
    """`device` if it holds a model of `num_bytes` with room to run it, else the CPU.

    Weights that training divides over several GPUs need not fit one of them.
    """
    if device.type != "cuda":
        return device
    torch.cuda.empty_cache()  # what torch keeps of models that are gone is free
    return device if _ROOM * num_bytes < torch.cuda.mem_get_info(device)[0] else torch.device("cpu")


def weight_bytes(directory: Path) -> int:
    """Bytes of the weights in a checkpoint's directory."""
    return sum(file.stat().st_size for file in directory.glob("model*.safetensors"))
