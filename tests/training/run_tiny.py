"""Train a tiny model as the recipes do and write what it computed; started by test_deepspeed.py.

Usage: accelerate launch ... run_tiny.py <output> <batch size per process> <model> [<model> ...]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny_training import losses, tiny_data, tiny_model, tiny_run

from photon_train.config import ConsistencySettings, DistillSettings, RunConfig
from photon_train.training.accelerator import make_accelerator
from photon_train.training.collect import gather_full_model
from photon_train.training.loop import train
from photon_train.training.lora import add_lora


def run_config(name: str, batch_size: int) -> RunConfig:
    """Two micro-batches per step, every loss part that the model has; the global batch is 8 sequences."""
    config = tiny_run(batch_size=batch_size, gradient_accumulation_steps=2)
    config.distill = DistillSettings(weight=0.2 if name.startswith("memory") else 0.0)
    config.consistency = ConsistencySettings(weight=0.2)
    return config


def main(output: Path, batch_size: int, names: list[str]) -> None:
    torch.manual_seed(1)
    accelerator = make_accelerator(run_config(names[0], batch_size), output)
    for name in names:
        config = run_config(name, batch_size)
        model = add_lora(tiny_model(name), config.lora, config.seed)
        result = train(
            model, tiny_data(20, seed=1), tiny_data(7, seed=2), config, output, accelerator=accelerator, name=name
        )
        # Once more from the checkpoint in the middle: the second half must come out the same.
        state = gather_full_model(accelerator, result.model)
        again = None
        if name == names[0]:
            newest = result.checkpoint
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                newest.rename(newest.with_name("set_aside"))
            accelerator.wait_for_everyone()
            config.resume = True
            model = add_lora(tiny_model(name), config.lora, config.seed)
            again = train(
                model, tiny_data(20, seed=1), tiny_data(7, seed=2), config, output, accelerator=accelerator, name=name
            )
        if accelerator.is_main_process:
            save_file({key: value.clone() for key, value in state.items()}, output / f"{name}.safetensors")
            summary = {
                "processes": accelerator.num_processes,
                "kind": str(accelerator.distributed_type),
                "keys": sorted(result.metrics),
                **{key: losses(result.history, key) for key in ("train/loss", "train/grad_norm", "eval/ce")},
                "resumed": losses(again.history) if again else None,
            }
            (output / f"{name}.json").write_text(json.dumps(summary))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
