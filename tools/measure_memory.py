"""Peak memory of real training steps against the estimate that `--dry-run` prints.

    python tools/measure_memory.py --output benchmarks/training/memory.json

The points of one ZeRO stage and precision share one `accelerate launch` with a configuration of `accelerate_configs/`.
Each runs the fine-tuning loop of the recipes on random weights and text; the second optimiser step is measured, in the
process that takes the most. With a GPU the points run on all GPUs of the machine and `torch.cuda.max_memory_allocated`
is read; without one, two processes share the CPU and torch's profiler counts the bytes of all tensors
(`lib.peak_memory`).
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import AutoConfig, PretrainedConfig

from lib import shapes
from lib.benchmark import read_rows
from lib.peak_memory import PeakMemory
from photon_train.accounting import TrainingSetup, training_memory
from photon_train.cli import main_wrapper
from photon_train.config import (
    DistillSettings,
    LoraSettings,
    PhotonSettings,
    RunConfig,
    TrackingSettings,
    TrainSettings,
)
from photon_train.conversion.presets import photon_config, target_of
from photon_train.data.packing import PackedDataset
from photon_train.errors import PhotonError
from photon_train.evaluation.report import write_rows
from photon_train.pipeline.prepare import training_setup
from photon_train.training.accelerator import make_accelerator
from photon_train.training.base_bits import quantise_base
from photon_train.training.loop import train
from photon_train.training.lora import add_lora

ROOT = Path(__file__).resolve().parents[1]
SHAPES = {
    "llama-2m": {
        "model_type": "llama",
        "hidden_size": 128,
        "intermediate_size": 448,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 2048,
    },
    "qwen3-20m": {
        "model_type": "qwen3",
        "hidden_size": 384,
        "intermediate_size": 1024,
        "num_hidden_layers": 8,
        "num_attention_heads": 6,
        "num_key_value_heads": 6,
        "head_dim": 64,
        "vocab_size": 8192,
    },
    "llama-1b": {"model_type": "llama", **shapes.SHAPES["1b"]},
}
CONFIGS = {
    "cpu": {0: "cpu.yaml", 2: "cpu_zero2.yaml", 3: "cpu_zero3.yaml"},
    "cuda": {0: "single_gpu.yaml", 2: "zero2.yaml", 3: "zero3.yaml"},
}


@dataclass(frozen=True)
class Point:
    """One training: the shape's name, and the settings that memory depends on.

    Attributes:
        memory: Of a graft: `layers`, all heads of an eighth of the layers with latents of 16-bit numbers, which is what
            rows without it had; or `cells`, the default.
    """

    shape: str
    zero_stage: int
    seq_len: int
    batch_size: int = 1
    weights: str = "float32"
    precision: str = "no"
    gradient_checkpointing: bool = False
    rank: int = 16
    distill: float = 0.0
    distill_hidden: float = 0.0
    preset: str = "graft"
    memory: str = "layers"
    base_bits: int = 16


POINTS = {
    "cpu": [
        Point("llama-2m", 0, 1024),
        Point("llama-2m", 0, 4096),
        Point("llama-2m", 0, 4096, gradient_checkpointing=True),
        Point("llama-2m", 0, 1024, batch_size=2, distill=1.0),
        Point("llama-2m", 0, 1024, rank=0),
        Point("llama-2m", 0, 1024, preset="split"),
        Point("llama-2m", 0, 4096, memory="cells"),
        Point("qwen3-20m", 0, 2048, gradient_checkpointing=True, memory="cells"),
        Point("qwen3-20m", 0, 1024),
        Point("qwen3-20m", 0, 2048, gradient_checkpointing=True),
        Point("llama-2m", 0, 2048, weights="bfloat16", precision="bf16"),
        Point("qwen3-20m", 0, 512, weights="bfloat16", precision="bf16", gradient_checkpointing=True),
        Point("llama-2m", 2, 2048),
        Point("llama-2m", 2, 4096, gradient_checkpointing=True),
        Point("qwen3-20m", 2, 1024),
        Point("llama-2m", 2, 2048, weights="bfloat16", precision="bf16"),
        Point("qwen3-20m", 2, 512, weights="bfloat16", precision="bf16", gradient_checkpointing=True),
        Point("llama-2m", 3, 2048),
        Point("llama-2m", 3, 4096, gradient_checkpointing=True),
        Point("qwen3-20m", 3, 1024),
        Point("llama-2m", 3, 2048, weights="bfloat16", precision="bf16"),
        Point("qwen3-20m", 3, 512, weights="bfloat16", precision="bf16", gradient_checkpointing=True),
    ],
    "cuda": [
        Point("llama-1b", stage, seq_len, 1, "bfloat16", "bf16", checkpointing)
        for stage in (0, 2, 3)
        for seq_len, checkpointing in ((4096, False), (8192, True), (32768, True))
    ],
}


def run_config(point: Point) -> RunConfig:
    """The settings of a recipe for three steps of `point`."""
    return RunConfig(
        preset=point.preset,
        train=TrainSettings(
            max_steps=3,
            seq_len=point.seq_len,
            batch_size=point.batch_size,
            mixed_precision=point.precision,
            gradient_checkpointing=point.gradient_checkpointing,
            base_bits=point.base_bits,
            warmup_steps=0,
            eval_every=0,
            eval_sequences=1,
            save_every=0,
        ),
        lora=LoraSettings(rank=point.rank),
        distill=DistillSettings(weight=point.distill, hidden_weight=point.distill_hidden),
        tracking=TrackingSettings(tracker="none"),
    )


def random_text(count: int, seq_len: int, vocab_size: int) -> PackedDataset:
    """Sequences of random tokens."""
    ids = torch.randint(0, vocab_size, (count, seq_len), generator=torch.Generator().manual_seed(0))
    return PackedDataset(ids.int(), torch.zeros(count, seq_len, dtype=torch.bool), num_documents=count)


def estimated(point: Point, processes: int) -> tuple[PretrainedConfig, TrainingSetup]:
    """What the estimate of `point` is computed from, for the ZeRO stage of this launch."""
    settings = dict(SHAPES[point.shape])
    dense = AutoConfig.for_model(settings.pop("model_type"), **settings)
    config, weight_bytes = run_config(point), getattr(torch, point.weights).itemsize
    if point.preset == "graft" and point.memory == "layers":
        config.photon = PhotonSettings(**shapes.whole_layers(dense))
    return photon_config(dense, config), training_setup(config, processes, weight_bytes, point.precision)


def estimated_again(row: dict[str, Any]) -> dict[str, Any]:
    """A measured row with today's estimate."""
    point = Point(**{field.name: row[field.name] for field in fields(Point) if field.name in row})
    photon, setup = estimated(point, row["processes"])
    estimate = training_memory(photon, replace(setup, zero_stage=point.zero_stage))
    ratio = estimate.device / row["measured_bytes"]
    return {**row, "predicted_bytes": estimate.device, "ratio": ratio, "parts": asdict(estimate)}


def measure(point: Point, output: Path, accelerator: Accelerator | None = None) -> dict[str, Any]:
    """Train for three steps in this process (and those beside it): the peak of the second, and the estimate.

    Args:
        point: What is trained.
        output: Directory that the training writes.
        accelerator: Of the points before, which had the same precision; None makes one.
    """
    config = run_config(point)
    accelerator = accelerator or make_accelerator(config, output)
    processes = accelerator.num_processes
    photon, setup = estimated(point, processes)
    estimate = training_memory(photon, setup)
    texts = [random_text(count, point.seq_len, photon.vocab_size) for count in (3 * point.batch_size * processes, 1)]
    # What the point before has left would be counted as released here.
    accelerator.free_memory()
    gc.collect()
    with PeakMemory(accelerator.device) as memory:
        model = target_of(photon).model(photon).to(getattr(torch, point.weights))
        model = add_lora(quantise_base(model, config.train, accelerator), config.lora)

        def on_step(step: int) -> None:
            if step == 1:
                memory.start()
            elif step == 2:
                memory.stop()

        train(model, *texts, config, output, accelerator=accelerator, on_step=on_step)
    peaks = accelerator.gather(torch.tensor([memory.peak], device=accelerator.device))
    measured = int(peaks.max())
    return {
        **asdict(point),
        "device": accelerator.device.type,
        "processes": processes,
        "predicted_bytes": estimate.device,
        "measured_bytes": measured,
        "ratio": estimate.device / measured,
        "parts": asdict(estimate),
    }


def launch(points: list[Point], device: str) -> list[dict[str, Any]]:
    """Measure points of one stage and precision through one `accelerate launch`.

    Raises:
        PhotonError: with the first error that the processes told, if they fail.
    """
    with tempfile.TemporaryDirectory() as scratch:
        result, stage = Path(scratch) / "result.json", points[0].zero_stage
        command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
        command += ["--config_file", str(ROOT / "accelerate_configs" / CONFIGS[device][stage])]
        if device == "cuda" and stage:
            command += ["--num_processes", str(torch.cuda.device_count())]
        command += [__file__, "--points", json.dumps([asdict(point) for point in points]), "--output", str(result)]
        environment = {**os.environ, **({"DS_ACCELERATOR": "cpu"} if device == "cpu" else {})}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
        if done.returncode:
            lines = [line.strip() for line in done.stderr.splitlines() if "rror:" in line]
            raise PhotonError(f"ZeRO stage {stage}: {lines[0] if lines else f'exit status {done.returncode}'}")
        return json.loads(result.read_text(encoding="utf-8"))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON to write")
    parser.add_argument("--jobs", type=int, default=1, help="launches side by side (nothing is timed); on a GPU take 1")
    parser.add_argument("--estimate-only", action="store_true", help="keep what --output measured, estimate it anew")
    parser.add_argument("--points", help=argparse.SUPPRESS)  # how this program starts itself
    return parser.parse_args()


def main() -> None:
    options = arguments()
    if options.points:
        points = [Point(**point) for point in json.loads(options.points)]
        folder = options.output.parent
        accelerator = make_accelerator(run_config(points[0]), folder)
        rows = [measure(point, folder / str(number), accelerator) for number, point in enumerate(points)]
        if os.environ.get("RANK", "0") == "0":
            options.output.write_text(json.dumps(rows), encoding="utf-8")
        return
    if options.estimate_only:
        write_rows(options.output, [estimated_again(row) for row in read_rows(options.output)])
        return
    rows = []
    device = "cuda" if torch.cuda.is_available() else "cpu"
    groups: dict[tuple[int, str], list[Point]] = {}
    for point in POINTS[device]:
        groups.setdefault((point.zero_stage, point.precision), []).append(point)
    with ThreadPoolExecutor(options.jobs) as pool:
        for found in pool.map(partial(launch, device=device), groups.values()):
            for row in found:
                rows.append(row)
                print(json.dumps({key: value for key, value in row.items() if key != "parts"}), flush=True)
            write_rows(options.output, rows)


if __name__ == "__main__":
    main_wrapper(main)
