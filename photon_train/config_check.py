"""Checks of a `RunConfig` that need no model: choices and ranges."""

from __future__ import annotations

from typing import Any

from photon_train.config import PRESETS, RunConfig
from photon_train.errors import PhotonError
from photon_train.files import parse_size

_CHOICES: dict[str, tuple[str, ...]] = {
    "preset": PRESETS,
    "photon.choose_layers": ("preset", "probe"),
    "train.mixed_precision": ("auto", "bf16", "fp16", "no"),
    "tracking.tracker": ("wandb", "tensorboard", "none"),
    "tracking.mode": ("auto", "online", "offline", "disabled"),
    "tracking.artifact": ("reference", "upload", "none"),
    "export.dtype": ("auto", "float32", "bfloat16", "float16"),
}
_AT_LEAST: dict[str, float] = {
    "seed": 0,
    "photon.num_levels": 1,
    "photon.window": 1,
    "photon.num_sinks": 0,
    "photon.num_memory_layers": 1,
    "photon.chunk_size": 1,
    "photon.memory_parts": 1,
    "dataset.max_documents": 1,
    "dataset.num_workers": 0,
    "train.max_steps": 1,
    "train.seq_len": 2,
    "train.batch_size": 1,
    "train.gradient_accumulation_steps": 1,
    "train.weight_decay": 0,
    "train.spike_sigma": 0,
    "train.spike_window": 2,
    "train.max_skipped_in_row": 1,
    "train.max_skipped_steps": 1,
    "train.warmup_steps": 0,
    "train.eval_every": 0,
    "train.eval_sequences": 1,
    "train.log_every": 1,
    "train.save_every": 0,
    "train.keep_checkpoints": 1,
    "lora.rank": 0,
    "lora.alpha": 1,
    "lora.dropout": 0,
    "distill.weight": 0,
    "distill.hidden_weight": 0,
    "consistency.weight": 0,
    "export.sample_tokens": 1,
}
_LEVEL_AT_LEAST = {"chunk_size": 1, "num_slots": 1, "encoder_layers": 0, "encoder_window": 0, "decoder_layers": 0}
_ABOVE: dict[str, float] = {
    "dataset.held_out_fraction": 0,
    "train.learning_rate": 0,
    "train.new_modules_learning_rate": 0,
    "train.max_grad_norm": 0,
    "distill.temperature": 0,
}
_BELOW: dict[str, float] = {"seed": 2**32, "dataset.held_out_fraction": 1, "lora.dropout": 1}


def validate(config: RunConfig) -> None:
    """Check choices and ranges; unset values (None) are the preset's to fill and pass.

    Raises:
        PhotonError: for the first value found wrong, naming its key and what is allowed.
    """
    for key, choices in _CHOICES.items():
        value = _get(config, key)
        if value is not None and value not in choices:
            raise PhotonError(f"{key} is {value!r}; choose one of {', '.join(choices)}")
    for key, least in _AT_LEAST.items():
        _check_least(key, _get(config, key), least)
    for index, level in enumerate(config.photon.levels):
        for name, least in _LEVEL_AT_LEAST.items():
            _check_least(f"photon.levels.{index}.{name}", getattr(level, name), least)
    for key, bound in _ABOVE.items():
        if _get(config, key) <= bound:
            raise PhotonError(f"{key} is {_get(config, key)}; it must be greater than {bound}")
    for key, bound in _BELOW.items():
        if _get(config, key) >= bound:
            raise PhotonError(f"{key} is {_get(config, key)}; it must be smaller than {bound}")
    for key in ("photon.memory_layers", "photon.full_attention_layers"):
        layers = _get(config, key) or []
        if len(set(layers)) != len(layers) or min(layers, default=0) < 0:
            raise PhotonError(f"{key} is {layers}; give each layer once, counted from 0")
    if config.photon.choose_layers == "probe" and config.photon.memory_layers is not None:
        raise PhotonError("photon.memory_layers is set, and photon.choose_layers=probe would choose them: drop one")
    if config.photon.memory_layers is not None and config.photon.num_memory_layers is not None:
        raise PhotonError("photon.memory_layers is set, and photon.num_memory_layers has them chosen: drop one")
    levels, num_levels = config.photon.levels, config.photon.num_levels
    if num_levels is not None and len(levels) > num_levels:
        raise PhotonError(
            f"photon.levels sets {len(levels)} levels but photon.num_levels is {num_levels}: raise it or drop levels"
        )
    for index, source in enumerate(config.dataset.sources):
        if not source.path or source.weight <= 0:
            raise PhotonError(f"dataset.sources.{index} needs a path and a weight greater than 0")
    if config.dataset.sources and config.data is not None:
        raise PhotonError("data and dataset.sources are both set: name every source in dataset.sources")
    parse_size(config.export.max_shard_size)
    if not config.output:
        raise PhotonError("output is empty; name the directory to write")


def _get(config: RunConfig, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def _check_least(key: str, value: float | None, least: float) -> None:
    if value is not None and value < least:
        raise PhotonError(f"{key} is {value}; it must be at least {least}")
