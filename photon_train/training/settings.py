"""A run's settings as one flat table, for trackers and for comparing a checkpoint with the run that resumes it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

from photon_train.config import RunConfig

# What may differ between a run and its continuation: where things lie and what is shown, never what is computed.
FREE_ON_RESUME = (
    "output",
    "dry_run",
    "resume",
    "tracking.",
    "export.",
    "dataset.num_workers",
    "train.eval_every",
    "train.eval_sequences",
    "train.log_every",
    "train.save_every",
    "train.keep_checkpoints",
    "train.max_skipped_in_row",
    "train.max_skipped_steps",
    "train.dense_baseline",
    "train.gpu_memory",
)

# Free too, as long as their product with the number of processes is the same.
_PARTS_OF_A_STEP = ("train.batch_size", "train.gradient_accumulation_steps")
SEQUENCES_PER_STEP = "sequences per step (processes x train.batch_size x train.gradient_accumulation_steps)"


def flat_config(config: RunConfig) -> dict[str, Any]:
    """`config` with dotted keys and JSON values; lists are kept whole. The hub token is left out.

    Example:
        ``{"train.max_steps": 1000, "photon.levels": [...], ...}``
    """

    def walk(prefix: str, value: Any) -> dict[str, Any]:
        if not isinstance(value, dict):
            return {prefix: value}
        rows: dict[str, Any] = {}
        for key, inner in value.items():
            rows.update(walk(f"{prefix}.{key}" if prefix else key, inner))
        return rows

    rows = walk("", dataclasses.asdict(config))
    rows.pop("hub.token", None)
    return rows


def binding_settings(config: RunConfig, num_processes: int) -> dict[str, Any]:
    """What a run on `num_processes` must share with the run that it continues: most of `flat_config`."""
    rows = {
        key: value
        for key, value in flat_config(config).items()
        if key not in _PARTS_OF_A_STEP
        and not any(key == free or (free.endswith(".") and key.startswith(free)) for free in FREE_ON_RESUME)
    }
    train = config.train
    rows[SEQUENCES_PER_STEP] = num_processes * train.batch_size * train.gradient_accumulation_steps
    return rows


def settings_hash(settings: dict[str, Any]) -> str:
    """SHA-256 of the settings' canonical JSON, as hexadecimal digits."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
