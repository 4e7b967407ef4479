"""A run's settings as one flat table, for trackers and for comparing a checkpoint with the run that resumes it."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from photon_train.config import RunConfig, to_dict
from photon_train.config.keys import all_keys

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

    return walk("", to_dict(config))


def binding_settings(config: RunConfig, num_processes: int) -> dict[str, Any]:
    """What a run on `num_processes` must share with the run that it continues: all that is not declared free."""
    marks, train = dict(all_keys()), config.train
    rows = {key: value for key, value in flat_config(config).items() if not marks[key]}
    rows[SEQUENCES_PER_STEP] = num_processes * train.batch_size * train.gradient_accumulation_steps
    return rows


def settings_hash(settings: dict[str, Any]) -> str:
    """SHA-256 of the settings' canonical JSON, as hexadecimal digits."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
