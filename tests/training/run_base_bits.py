"""Fine-tune a tiny graft over a base in 4 bits and write what it computed; started by test_base_bits.py.

Usage: [accelerate launch ...] run_base_bits.py <output> <batch size per process>
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tiny_training import losses, tiny_data, tiny_model, tiny_run

from photon_train.training.accelerator import make_accelerator
from photon_train.training.base_bits import StoredWeights, quantise_base
from photon_train.training.collect import gather_full_model
from photon_train.training.loop import train
from photon_train.training.lora import add_lora


def main(output: Path, batch_size: int) -> None:
    """Six steps of the same global batch, then the sums that tell one exported model from another."""
    config = tiny_run(base_bits=4, batch_size=batch_size)
    accelerator = make_accelerator(config, output)
    model = tiny_model("memory", hidden_size=64, head_dim=16)
    if accelerator.is_main_process:
        model.save_pretrained(output / "start")
    accelerator.wait_for_everyone()
    model = add_lora(quantise_base(model, config.train, accelerator), config.lora, config.seed)
    result = train(model, tiny_data(40), tiny_data(6, seed=1), config, output, accelerator=accelerator)
    state = gather_full_model(accelerator, result.model, StoredWeights(output / "start"))
    if accelerator.is_main_process:
        found = {key: losses(result.history, key) for key in ("train/loss", "train/grad_norm", "eval/ce")}
        found["exported"] = [float(tensor.double().abs().sum()) for _, tensor in sorted(state.items())]
        (output / "found.json").write_text(json.dumps({"processes": accelerator.num_processes, **found}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
