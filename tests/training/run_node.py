"""Train a tiny model as one node of several; started by test_nodes.py through `accelerate launch`.

Usage: accelerate launch ... run_node.py <output> <batch size per process> <step to hang after, 0 for none>
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from tiny_training import tiny_data, tiny_model, tiny_run

from photon_train.config import RunConfig
from photon_train.training.loop import TrainResult, train
from photon_train.training.lora import add_lora


def settings(batch_size: int) -> RunConfig:
    """Four steps of eight sequences, a checkpoint after every second."""
    config = tiny_run({"target_modules": ["q_proj", "down_proj"]}, batch_size=batch_size, max_steps=4, save_every=2)
    config.train.eval_every, config.resume = 0, True
    return config


def main(output: Path, batch_size: int, hang_after: int) -> TrainResult:
    def on_step(step: int) -> None:
        if step == hang_after:
            (output / "hangs").touch()
            time.sleep(600)  # until it is killed

    config = settings(batch_size)
    model = add_lora(tiny_model("memory"), config.lora, config.seed)
    return train(model, tiny_data(20, seed=1), tiny_data(7, seed=2), config, output, on_step=on_step)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
