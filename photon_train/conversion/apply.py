"""Carrying out a `ConversionPlan`: shard by shard, tensor by tensor, complete or not at all."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig, PretrainedConfig

from photon_train.conversion.layout import INDEX, copy_small_files, shard_name, write_index
from photon_train.conversion.operators import OPERATORS
from photon_train.conversion.plan import ConversionPlan, TensorPlan
from photon_train.conversion.presets import target_of
from photon_train.conversion.safetensors_io import ShardWriter, check_finite
from photon_train.conversion.source import DenseCheckpoint
from photon_train.errors import PhotonError
from photon_train.files import atomic_directory, atomic_file, check_can_write, parse_size
from photon_train.manifest import write_manifest

PLAN = "plan.json"


def convert(
    checkpoint: DenseCheckpoint,
    plan: ConversionPlan,
    config: PretrainedConfig,
    output_dir: Path,
    max_shard_size: str | int = "5GB",
    progress: bool = True,
    run_config: dict[str, Any] | None = None,
    on_written: Callable[[Path], None] | None = None,
) -> None:
    """Write the PHOTON checkpoint that `plan` describes.

    Tensors pass through a buffer of a few megabytes, so the memory needed does not depend on the model's size.
    Copies of dense tensors come first; the last shard holds what the conversion adds.

    Args:
        checkpoint: The dense model.
        plan: From `presets.make_plan`.
        config: The PHOTON configuration that the plan was made for.
        output_dir: Directory to create; it appears when everything is written, and only then.
        max_shard_size: Bytes of a weight file, or a text such as ``5GB``.
        progress: Show a bar with bytes/s and the time left.
        run_config: The run's settings, for the manifest.
        on_written: Called with the directory (still under a temporary name) before the manifest is written; what
            it raises undoes the conversion. `calibrate.calibrate_directory` goes here.

    Raises:
        PhotonError: before anything is written, if `output_dir` is not empty, the disk is too full, a known hash is
            wrong or the tokenizer does not fit the vocabulary; while writing, at a weight that is not finite or
            not so in the plan's type, or if the disk fills up.
    """
    output_dir = Path(output_dir)
    check_can_write(output_dir, plan.num_bytes, "the converted model")
    checkpoint.check_tokenizer()
    checkpoint.check_hashes()
    shards = _shards(plan, parse_size(max_shard_size))
    try:
        with atomic_directory(output_dir) as directory:
            _check_tied_head(checkpoint, config)
            _write_weights(checkpoint, plan, directory, shards, progress)
            _write_small_files(checkpoint, plan, config, directory)
            if on_written is not None:
                on_written(directory)
            write_manifest(directory, "converted", run_config or {}, {"model": checkpoint.directory})
    except (OSError, SafetensorError) as error:
        raise PhotonError(f"{output_dir} cannot be written: {error}; nothing of it is left") from error


def _is_new(entry: TensorPlan) -> bool:
    return not entry.sources


def _shards(plan: ConversionPlan, max_bytes: int) -> list[list[TensorPlan]]:
    """Dense copies in shards of at most `max_bytes` (or one tensor), then one shard with the new tensors, if any."""
    itemsize = plan.torch_dtype.itemsize
    shards: list[list[TensorPlan]] = []
    room = 0
    for entry in plan.tensors:
        if _is_new(entry):
            continue
        size = math.prod(entry.shape) * itemsize
        if size > room or not shards:
            shards.append([])
            room = max_bytes
        shards[-1].append(entry)
        room -= size
    new = [entry for entry in plan.tensors if _is_new(entry)]
    return [*shards, new] if new else shards


def _check_tied_head(checkpoint: DenseCheckpoint, config: PretrainedConfig) -> None:
    """A stored head that config.json calls tied must be the embedding."""
    if not config.tie_word_embeddings or "lm_head.weight" not in checkpoint.tensors:
        return
    pairs = zip(checkpoint.pieces("model.embed_tokens.weight"), checkpoint.pieces("lm_head.weight"), strict=True)
    if not all(torch.equal(embedding, head) for embedding, head in pairs):
        raise PhotonError(
            f"{checkpoint.directory}: lm_head.weight differs from the embedding, but config.json says "
            "tie_word_embeddings: set that to false"
        )


def _write_weights(
    checkpoint: DenseCheckpoint,
    plan: ConversionPlan,
    directory: Path,
    shards: list[list[TensorPlan]],
    progress: bool,
) -> None:
    dtype = plan.torch_dtype
    weight_map: dict[str, str] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), disable=not progress, transient=True) as bar:
        task = bar.add_task("Converting", total=plan.num_bytes)
        for number, entries in enumerate(shards, start=1):
            name = shard_name(number, len(shards))
            with ShardWriter(directory / name, {entry.target: entry.shape for entry in entries}, dtype) as writer:
                for entry in entries:
                    streams = [checkpoint.pieces(source) for source in entry.sources]
                    writer.write(entry.target, OPERATORS[entry.operator](entry.shape, entry.arguments, streams))
                    weight_map[entry.target] = name
                    bar.advance(task, math.prod(entry.shape) * dtype.itemsize)
    write_index(directory, weight_map, plan.num_bytes)


def _write_small_files(
    checkpoint: DenseCheckpoint, plan: ConversionPlan, config: PretrainedConfig, directory: Path
) -> None:
    config.architectures = [target_of(config).model.__name__]
    config.dtype = plan.torch_dtype
    config.save_pretrained(directory)
    (directory / PLAN).write_text(plan.to_json(), encoding="utf-8")
    copy_small_files(checkpoint.directory, directory)
    if not (directory / "generation_config.json").is_file():
        GenerationConfig.from_model_config(config).save_pretrained(directory)


def rewrite_new_tensors(directory: Path, values: dict[str, torch.Tensor]) -> None:
    """Replace tensors in the shard of new modules, and nothing else; the shard is swapped in whole.

    Args:
        directory: What `convert` wrote.
        values: Name -> new value, of the stored shape.

    Raises:
        PhotonError: if a name is not a new tensor of this checkpoint, or a value is not finite in the stored type.
    """
    if not values:
        return
    weight_map = json.loads((directory / INDEX).read_text(encoding="utf-8"))["weight_map"]
    last = max(weight_map.values())
    tensors = load_file(directory / last)
    for name, value in values.items():
        if name not in tensors or tensors[name].shape != value.shape:
            raise PhotonError(f"{directory / last} holds no tensor {name} of shape {list(value.shape)}")
        tensors[name] = value.detach().to("cpu", tensors[name].dtype).contiguous()
        check_finite(name, tensors[name])
    with atomic_file(directory / last) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
