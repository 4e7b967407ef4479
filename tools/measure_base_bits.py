"""What fine-tuning over a base in 4 bits (`train.base_bits`) costs, and which weights its adapters should be added to.

    python tools/measure_base_bits.py --model runs/smollm2-dense --output benchmarks/training/base_bits.json

A dense model is fine-tuned twice on the Python standard library, over its own weights and over the rounded ones, with
the same text, seed and steps. Held-out cross-entropies are those of the model that was trained, and of its adapters
added to the weights of the checkpoint (what is exported) and to the rounded ones.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from photon_train.cli import main_wrapper
from photon_train.config import LoraSettings, RunConfig, TrackingSettings, TrainSettings
from photon_train.evaluation.report import write_rows
from photon_train.pipeline.prepare import Text, load_text, load_tokenizer
from photon_train.training.accelerator import make_accelerator
from photon_train.training.base_bits import StoredWeights, is_quantised, quantise_base
from photon_train.training.collect import gather_full_model
from photon_train.training.loop import evaluate, train
from photon_train.training.lora import add_lora
from photon_train.training.losses import TrainingObjective


def run_config(options: argparse.Namespace, bits: int) -> RunConfig:
    """The settings of a recipe for a few steps in fp32."""
    return RunConfig(
        train=TrainSettings(
            base_bits=bits,
            max_steps=options.steps,
            seq_len=options.seq_len,
            learning_rate=options.learning_rate,
            batch_size=options.batch_size,
            warmup_steps=options.steps // 10,
            mixed_precision="no",
            eval_every=0,
            eval_sequences=options.eval_sequences,
            save_every=0,
        ),
        lora=LoraSettings(rank=16),
        tracking=TrackingSettings(tracker="none"),
    )


def rounded_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The quantised weights as numbers, by name."""
    from bitsandbytes.functional import dequantize_4bit

    layers = {name: module for name, module in model.named_modules() if is_quantised(module)}
    return {
        f"{name}.weight": dequantize_4bit(each.weight.data, each.weight.quant_state).cpu()
        for name, each in layers.items()
    }


def measure(directory: Path, options: argparse.Namespace, bits: int, text: Text | None) -> tuple[dict[str, Any], Text]:
    """One fine-tuning: its cross-entropies (nats per token); `text` is read where none is given, and handed back."""
    config = run_config(options, bits)
    with tempfile.TemporaryDirectory() as scratch:
        accelerator = make_accelerator(config, scratch)
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        if text is None:
            text = load_text(config, load_tokenizer(directory, model.config.vocab_size, config.dataset), 1, 1, False)
        model = quantise_base(model, config.train, accelerator)
        rounded = rounded_weights(model)
        result = train(
            add_lora(model, config.lora), text.train, text.held_out, config, scratch, accelerator=accelerator
        )
        row = {"base_bits": bits, "before": result.initial_ce, "trained": result.metrics["eval/ce"]}
        bases = {"stored": StoredWeights(directory), "rounded": rounded.__getitem__} if rounded else {"stored": None}
        for name, base in bases.items():
            merged = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
            merged.load_state_dict(gather_full_model(accelerator, result.model, base))
            objective = TrainingObjective(merged.to(accelerator.device))
            row[f"merged_{name}"] = evaluate(accelerator, objective, text.held_out, config)
    return row, text


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="directory of a dense checkpoint")
    parser.add_argument("--output", type=Path, required=True, help="JSON to write")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--eval-sequences", type=int, default=32)
    return parser.parse_args()


def main() -> None:
    options, rows, text = arguments(), [], None
    for bits in (16, 4):
        row, text = measure(options.model, options, bits, text)
        rows.append({**row, "model": options.model.name, "steps": options.steps, "seq_len": options.seq_len})
        print(json.dumps(rows[-1]), flush=True)
        write_rows(options.output, rows)


if __name__ == "__main__":
    main_wrapper(main)
