"""Speed and peak memory of fine-tuning with LoRA: PHOTON (`graft`) against the dense model it is made of.

    python tools/bench_training.py --output benchmarks/training/speed.json

Both models have the same random weights, read the same tokens and take the optimiser steps of the recipes (LoRA on
every linear layer, PHOTON's new modules in full), in turns in one process; the ratio is the median over the turns.
Before anything is timed, PHOTON with a window as long as the text must give the dense model's logits, and gradient
checkpointing must change neither loss nor gradients. Peak memory is that of an own step (`PeakMemory`). On a CPU one
thread computes and its CPU time is taken, so that what else runs on the machine counts less; on a GPU it is wall time.

A GPU is used where there is one: `--shape llama-1b --contexts 4096 32768 131072 --gradient-checkpointing`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from lib import shapes
from lib.peak_memory import PeakMemory
from lib.plots import plot_training
from photon_train.accounting import dense_flops, photon_flops
from photon_train.cli import main_wrapper
from photon_train.config import LoraSettings, RunConfig, TrainSettings
from photon_train.conversion.graft import format_cells
from photon_train.conversion.presets import photon_config
from photon_train.data.pretrain import fast_dtype
from photon_train.errors import PhotonError
from photon_train.evaluation.report import write_rows
from photon_train.models import PhotonForCausalLM
from photon_train.training.loop import enable_checkpointing
from photon_train.training.lora import add_lora, parameter_groups
from photon_train.training.losses import TrainingObjective

SHAPES = {
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 1024,
    },
    "llama-1b": shapes.SHAPES["1b"],
}
CONTEXTS = (1024, 2048, 4096, 8192, 16384, 32768)
SYSTEMS = ("dense", "photon")
_CHECKED_TOKENS = 512
_TOLERANCE = 2e-4  # on logits, fp32


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON to write; a plot (.png) goes beside it")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="tiny")
    parser.add_argument("--contexts", type=int, nargs="+", default=CONTEXTS, help="tokens per sequence")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--turns", type=int, default=5, help="timed steps of each model at the shortest context")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    return parser.parse_args()


def make_models(config: LlamaConfig, run: RunConfig) -> dict[str, PreTrainedModel]:
    """The dense model, and the graft with copies of its weights; fp32."""
    torch.manual_seed(0)
    dense = LlamaForCausalLM(config)
    photon = PhotonForCausalLM(photon_config(config, run))
    missing, unexpected = photon.load_state_dict(dense.state_dict(), strict=False)
    if unexpected or not all(".memory." in name for name in missing):
        raise PhotonError(f"the graft's weights do not have the dense model's names: {[*unexpected, *missing][0]}")
    return {"dense": dense, "photon": photon}


@torch.no_grad()
def check_function(models: dict[str, PreTrainedModel], ids: torch.Tensor) -> float:
    """Largest difference of the logits, with a window over the whole text.

    Raises:
        PhotonError: if it is more than the tolerance.
    """
    ids, config = ids[:, :_CHECKED_TOKENS], models["photon"].config
    dense, own = models["dense"](ids).logits, config.window
    config.window = max(own, ids.shape[1])
    difference = float((models["photon"](ids).logits - dense).abs().max())
    config.window = own
    if not difference <= _TOLERANCE:
        raise PhotonError(f"PHOTON with a window of the whole text differs from the dense model by {difference:.2g}")
    return difference


class Trainee:
    """A model with LoRA and its optimiser."""

    def __init__(self, model: PreTrainedModel, run: RunConfig, device: torch.device, autocast: bool) -> None:
        self.model = add_lora(model, run.lora, run.seed)
        self.objective = TrainingObjective(self.model).to(device).train()
        self.device, self.autocast = device, autocast
        self.optimizer = AdamW(parameter_groups(self.model, run.train), lr=0.0)
        self.trained = [parameter for parameter in self.objective.parameters() if parameter.requires_grad]

    def backward(self, ids: torch.Tensor) -> float:
        """Loss and gradients of one batch ``[B, T]``."""
        counts = {"target_tokens": torch.tensor(ids[:, 1:].numel()), "sequences": torch.tensor(len(ids))}
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.autocast):
            loss = self.objective(input_ids=ids, labels=ids, **counts)["total"]
        loss.backward()
        return float(loss.detach())

    def step(self, ids: torch.Tensor) -> float:
        """One optimiser step; the loss. (The learning rate is zero, so that all steps are alike.)"""
        loss = self.backward(ids)
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss

    def gradients(self, ids: torch.Tensor) -> tuple[float, torch.Tensor]:
        """Loss and all gradients in one vector."""
        loss = self.backward(ids)
        flat = torch.cat([parameter.grad.flatten().float() for parameter in self.trained])
        self.optimizer.zero_grad()
        return loss, flat

    def seconds(self, ids: torch.Tensor) -> float:
        """Time of one step; on a CPU its CPU time."""
        clock = time.process_time if self.device.type == "cpu" else time.perf_counter
        self._wait()
        began = clock()
        self.step(ids)
        self._wait()
        return clock() - began

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def check_checkpointing(name: str, trainee: Trainee, ids: torch.Tensor) -> float:
    """Relative difference that gradient checkpointing makes to the gradients; it is left switched on.

    Raises:
        PhotonError: if there is one, or the loss differs or is not finite.
    """
    loss, plain = trainee.gradients(ids)
    enable_checkpointing(trainee.model)
    again, recomputed = trainee.gradients(ids)
    difference = float((recomputed - plain).norm() / plain.norm())
    limit = 0.02 if trainee.autocast else 1e-4
    if not (math.isfinite(loss) and abs(again - loss) <= limit * loss and difference <= limit):
        raise PhotonError(
            f"{name}: checkpointing changes the loss {loss} to {again}, the gradients by {difference:.2g}"
        )
    return difference


def measure(trainees: dict[str, Trainee], ids: torch.Tensor, turns: int) -> dict[str, dict[str, Any]]:
    """Peak bytes and tokens/s of a step on ``ids [B, T]`` per system."""
    found: dict[str, dict[str, Any]] = {}
    for name, trainee in trainees.items():
        with PeakMemory(trainee.device) as memory:  # it is the warm-up as well
            memory.start()
            loss = trainee.step(ids)
            memory.stop()
        if not math.isfinite(loss):
            raise PhotonError(f"{name} at {ids.shape[1]} tokens: the loss is {loss}")
        resident = sum(parameter.nbytes for parameter in trainee.objective.parameters())
        resident += 2 * sum(parameter.nbytes for parameter in trainee.trained)  # AdamW's moments
        # On a CPU what was made before the context is not counted: weights and moments are.
        on_cpu = trainee.device.type == "cpu"
        found[name] = {"loss": loss, "peak_bytes": memory.peak + resident if on_cpu else memory.peak, "seconds": []}
    for _ in range(turns):
        for name, trainee in trainees.items():
            found[name]["seconds"].append(trainee.seconds(ids))
    return found


def main() -> None:
    options = arguments()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)
    longest = max(options.contexts)
    config = LlamaConfig(**SHAPES[options.shape] | {"max_position_embeddings": longest})
    run = RunConfig(train=TrainSettings(seq_len=longest), lora=LoraSettings())
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (options.batch_size, longest), generator=generator).to(device)
    models = {name: model.to(device) for name, model in make_models(config, run).items()}
    checks = {"logits_difference": check_function(models, ids)}
    photon = models["photon"].config
    autocast = device.type == "cuda" and fast_dtype(device) is torch.bfloat16
    if autocast:
        models = {name: model.to(torch.bfloat16) for name, model in models.items()}
    for name, model in models.items():
        trainee = Trainee(model, run, device, autocast)
        checks[f"{name}_checkpointing_difference"] = check_checkpointing(name, trainee, ids[:, :_CHECKED_TOKENS])
        if not options.gradient_checkpointing:
            trainee.model.gradient_checkpointing_disable()
        models[name] = trainee
    print(json.dumps(checks), flush=True)
    rows: list[dict[str, Any]] = []
    previous = dict.fromkeys(SYSTEMS, (0, 0))
    for context in sorted(options.contexts):
        turns = max(1, options.turns - int(math.log2(context / min(options.contexts))))
        found = measure(models, ids[:, :context], turns)
        ratios = [d / p for d, p in zip(found["dense"]["seconds"], found["photon"]["seconds"], strict=True)]
        for name in SYSTEMS:
            peak, tokens = found[name]["peak_bytes"], options.batch_size * context
            before_tokens, before_peak = previous[name]
            previous[name] = tokens, peak
            flops = dense_flops(config, context // 2) if name == "dense" else photon_flops(photon, context // 2)
            row = {
                "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
                "system": name,
                "context": context,
                "batch_size": options.batch_size,
                "gradient_checkpointing": options.gradient_checkpointing,
                "turns": turns,
                "clock": "CPU time of one thread" if device.type == "cpu" else "wall time",
                "tokens_per_s": tokens / statistics.median(found[name]["seconds"]),
                "speed_ratio": statistics.median(ratios) if name == "photon" else 1.0,
                "peak_bytes": peak,
                "peak_ratio": peak / found["dense"]["peak_bytes"],
                "added_bytes_per_token": (peak - before_peak) / (tokens - before_tokens) if before_tokens else None,
                "forward_flops_per_token": flops,
                "loss": found[name]["loss"],
            }
            rows.append(row)
            print(json.dumps(row), flush=True)
        shape = {"name": options.shape, **SHAPES[options.shape], "window": photon.window, "sinks": photon.num_sinks}
        shape |= {"memory_cells": format_cells(photon.memory_cells), "memory_bits": photon.memory_bits}
        shape |= {"chunk_size": photon.chunk_size}
        write_rows(options.output, rows, shape=shape, lora=dataclasses.asdict(run.lora), checks=checks)
    plot_training(rows, options.output.with_suffix(".png"))


if __name__ == "__main__":
    main_wrapper(main)
