"""Train a tiny model as the recipes do and write what it computed; started by test_deepspeed.py.

Usage: accelerate launch ... run_tiny.py <output> <batch size per process> <model> [<model> ...]
Where <output> holds checkpoints already, each model is trained to its end from the newest of them.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from safetensors.torch import save_file
from tiny import VOCABULARY
from tiny_training import Poison, losses, tiny_data, tiny_model, tiny_run
from transformers import AutoModelForCausalLM, PreTrainedModel

from photon_train.config import ConsistencySettings, DistillSettings, RunConfig
from photon_train.data.packing import PackedDataset
from photon_train.training import heads
from photon_train.training.accelerator import make_accelerator
from photon_train.training.collect import gather_full_model
from photon_train.training.loop import TrainResult, evaluate, prepare_for_evaluation, train
from photon_train.training.lora import add_lora
from photon_train.training.losses import TrainingObjective
from photon_train.training.shards import empty_model, is_sharded


def run_config(name: str, batch_size: int) -> RunConfig:
    """Two micro-batches per step, and every loss part that the model has."""
    config = tiny_run(
        # Every adapter adds modules on which ZeRO-3 hangs its slow hooks.
        {"target_modules": ["q_proj", "down_proj"]},
        batch_size=batch_size,
        gradient_accumulation_steps=2,
        max_steps=4,
        save_every=2,
        eval_every=0,
        new_modules_learning_rate=5e-3,
    )
    if name.startswith("memory"):
        config.distill = DistillSettings(weight=0.2, hidden_weight=0.1)
    config.consistency = ConsistencySettings(weight=0.2)
    return config


def sets(name: str) -> tuple[PackedDataset, PackedDataset]:
    """Sequences to train on and held-out ones; the graft's hold isolated documents, a different number each.

    The hierarchical model's mean of recursive consistency over a micro-batch would depend on how they are divided.
    """
    documents = name.startswith("memory")
    return tiny_data(20, seed=1, documents=documents), tiny_data(7, seed=2, documents=documents)


def main(output: Path, batch_size: int, names: list[str]) -> None:
    """Train each model in turn with one Accelerator; the first also with dropout and resumed, and with bad steps."""
    accelerator = make_accelerator(run_config(names[0], batch_size), output)
    if accelerator.deepspeed_plugin is not None:
        # DeepSpeed keeps small parameters whole, and here all are small: shard the matrices.
        accelerator.deepspeed_plugin.deepspeed_config["zero_optimization"]["stage3_param_persistence_threshold"] = 100
        # The vocabulary losses in chunks that are computed again in the backward pass, here with a sharded head.
        heads.CHUNK_ELEMENTS = 16 * VOCABULARY

    def loaded(source: Path) -> PreTrainedModel:
        if is_sharded(accelerator) and not accelerator.is_main_process:
            return empty_model(source)
        model = AutoModelForCausalLM.from_pretrained(source)
        assert all(parameter.numel() for parameter in model.parameters()), "loaded in shards"
        return model

    def run(name: str, folder: Path = output, resume: bool = False) -> TrainResult:
        config = run_config(name, batch_size)
        config.resume = resume
        # As in a real run: loaded once the Accelerator exists.
        source = output / "models" / name
        if accelerator.is_main_process and not source.exists():
            tiny_model(name).save_pretrained(source)
        accelerator.wait_for_everyone()
        model = loaded(source)
        config.lora.dropout = 0.2 if folder.name == "dropout" else 0.0
        model = add_lora(model, config.lora, config.seed)
        spoiler = None
        if folder.name == "poisoned":
            config.train.spike_window, config.train.max_steps = 4, 6
            spoiler = Poison(model, {3: "nan", 5: "gradient"}, active=accelerator.is_main_process)
        return train(model, *sets(name), config, folder, accelerator=accelerator, name=name, on_step=spoiler)

    if (output / "checkpoints").exists():
        for name in names:
            result = run(name, resume=True)
            if accelerator.is_main_process:
                found = {key: losses(result.history, key) for key in ("train/loss", "train/learning_rate", "eval/ce")}
                (output / f"{name}.json").write_text(json.dumps({"processes": accelerator.num_processes, **found}))
        return
    for name in names:
        result = run(name)
        state = gather_full_model(accelerator, result.model)
        summary = {
            "processes": accelerator.num_processes,
            "kind": accelerator.distributed_type.value,
            "stage": accelerator.deepspeed_plugin.zero_stage if accelerator.deepspeed_plugin else 0,
            **{key: losses(result.history, key) for key in ("train/loss", "train/grad_norm", "eval/ce")},
        }
        if name == names[0]:
            # Every process draws its own dropout, so this tells whether each has its generators back.
            result = run(name, output / "dropout")
            summary["dropout"] = losses(result.history)
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                shutil.rmtree(result.checkpoint)
            accelerator.wait_for_everyone()
            summary["resumed"] = losses(run(name, output / "dropout", resume=True).history)
            poisoned = run(name, output / "poisoned").history
            summary["skipped"] = {r["step"]: r["train/skipped_steps"] for r in poisoned if "train/skipped_steps" in r}
            summary["poisoned"] = losses(poisoned)
            accelerator.free_memory()
            untrained = prepare_for_evaluation(accelerator, TrainingObjective(loaded(output / "models" / name)))
            summary["untrained"] = evaluate(accelerator, untrained, sets(name)[1], run_config(name, batch_size))
            summary["largest"] = max(parameter.numel() for parameter in untrained.parameters())
        if accelerator.is_main_process:
            save_file(state, output / f"{name}.safetensors")
            (output / f"{name}.json").write_text(json.dumps(summary))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
