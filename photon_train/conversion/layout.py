"""The files of a checkpoint's directory in Hugging Face's format, by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)
# Named templates beside the default one, each in a file of its own.
TEMPLATES = "additional_chat_templates"
_SMALL_FILES = (*TOKENIZER_FILES, "generation_config.json")


def shard_name(number: int, count: int) -> str:
    """Name of weight file `number` (from 1) of `count`."""
    return f"model-{number:05d}-of-{count:05d}.safetensors"


def write_index(directory: Path, weight_map: dict[str, str], num_bytes: int) -> None:
    """Write the index of the weight files: tensor -> file, and the bytes of all tensors."""
    index = {"metadata": {"total_size": num_bytes}, "weight_map": weight_map}
    (directory / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def copy_small_files(source: Path, target: Path) -> None:
    """Copy tokenizer, chat templates and generation settings, as far as there are any."""
    for name in _SMALL_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    if (source / TEMPLATES).is_dir():
        shutil.copytree(source / TEMPLATES, target / TEMPLATES)
