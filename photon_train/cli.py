"""From a command line to a checked `RunConfig`: defaults < YAML (``--config``) < dotted overrides.

The loader is strict: an unknown key, a value of the wrong type or out of range is one `PhotonError` that names
the key, where it stood and the mend. Nothing heavy is imported, so ``--help`` answers at once.
"""

from __future__ import annotations

import copy
import dataclasses
import errno
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from photon_train.cli_help import format_help
from photon_train.config import RunConfig
from photon_train.config_check import validate
from photon_train.config_values import coerce, element_type, field_types, merge, unknown_key, without_none
from photon_train.config_yaml import parse_yaml, read_yaml, to_dict, to_yaml
from photon_train.errors import PhotonError

__all__ = ["load_config", "main_wrapper", "to_dict", "to_yaml", "validate"]

_COMMAND_LINE = "the command line"
_BOOLEANS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
# A list grows to the index that an override names; the bound turns a slip of the finger into an error.
_MAX_INDEX = 15
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_WAIT = 10.0  # seconds; launchers look after their processes more often


def load_config(argv: list[str] | None, *, prog: str, description: str, defaults: RunConfig | None = None) -> RunConfig:
    """Read the command line of a recipe.

    Args:
        argv: Arguments without the program's name; None takes `sys.argv`.
        prog: Program name shown by ``--help``.
        description: What the program does, shown by ``--help``.
        defaults: Starting values; None takes those of `RunConfig`.

    Returns:
        A new, validated configuration.

    Raises:
        PhotonError: if a key is unknown, a value has the wrong type or range, or a file cannot be read.
        SystemExit: with status 0 after ``--help``.
    """
    config = RunConfig() if defaults is None else copy.deepcopy(defaults)
    arguments = sys.argv[1:] if argv is None else argv
    if "--help" in arguments or "-h" in arguments:
        print(format_help(config, prog=prog, description=description))
        raise SystemExit(0)
    files, overrides = _split_arguments(arguments)
    for file in files:
        merge(config, read_yaml(file), "", str(file))
    for key, text in overrides:
        _override(config, key, text)
    validate(config)
    return config


def main_wrapper(function: Callable[[], object]) -> NoReturn:
    """Run a recipe's main function and exit: 0 on success, 2 with one line on stderr for a `PhotonError`, a full disk.

    Most errors are met by all processes, and the first on each machine speaks: the others wait for so long that the
    launcher has ended them. What one of them meets alone (a hub that did not answer it) it then says itself.
    """
    try:
        function()
    except (PhotonError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in _DISK_FULL:
            raise
        place = ""
        if os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(_WAIT)
            place = f" (process {os.environ.get('RANK', os.environ['LOCAL_RANK'])})"
        print(f"error{place}: {_one_line(error)}", file=sys.stderr)
        raise SystemExit(2) from None
    raise SystemExit(0)


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError):
        name = error.filename or "a file"
        return f"{name} cannot be written: {error.strerror}; free some, then start the run again with --resume"
    return " ".join(str(error).split())


def _split_arguments(arguments: list[str]) -> tuple[list[Path], list[tuple[str, str]]]:
    """Return the YAML files and the (dotted key, text) overrides, each in the order given."""
    files: list[Path] = []
    overrides: list[tuple[str, str]] = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("--") or argument == "--":
            raise PhotonError(f"unexpected argument {argument!r}: settings are given as --key value (see --help)")
        name, has_value, text = argument[2:].partition("=")
        key = name.replace("-", "_")
        kind = str if key == "config" else _type_of_key(key)
        if not has_value:
            if rest and not rest[0].startswith("--"):
                text = rest.pop(0)
            elif kind is bool:
                text = "true"
            else:
                raise PhotonError(f"--{name} needs a value (one that starts with -- is written --{name}=VALUE)")
        if key == "config":
            files.append(Path(text))
        else:
            overrides.append((key, text))
    return files, overrides


def _type_of_key(key: str) -> Any:
    """Declared type of a dotted key such as ``photon.levels.0.chunk_size``."""
    kind: Any = RunConfig
    for part in key.split("."):
        element = element_type(kind)
        if dataclasses.is_dataclass(element) and part.isdecimal():
            kind = element
        elif dataclasses.is_dataclass(kind) and part in field_types(kind):
            kind = field_types(kind)[part]
        else:
            raise unknown_key(key, _COMMAND_LINE)
    return kind


def _override(config: RunConfig, key: str, text: str) -> None:
    """Set one dotted key from its text; a list of groups grows to the index that the key names."""
    kind = _type_of_key(key)
    if dataclasses.is_dataclass(kind):
        raise PhotonError(f"--{key} is a group of settings: give --{key}.NAME VALUE (see --help)")
    *parents, name = key.split(".")
    owner: Any = config
    owner_kind: Any = RunConfig
    for parent in parents:
        element = element_type(owner_kind)
        if element is None:
            owner, owner_kind = getattr(owner, parent), field_types(owner_kind)[parent]
            continue
        index = int(parent)
        if index > _MAX_INDEX:
            raise PhotonError(f"--{key}: the index {index} is too large (at most {_MAX_INDEX})")
        owner.extend(element() for _ in range(index + 1 - len(owner)))
        owner, owner_kind = owner[index], element
    setattr(owner, name, coerce(_plain_value(text, kind), kind, key, _COMMAND_LINE))


def _plain_value(text: str, kind: Any) -> Any:
    """Give the text of an override the shape that the same value has in YAML."""
    if kind is not without_none(kind) and text.lower() in ("none", "null"):
        return None
    if kind is bool:
        return _BOOLEANS.get(text.lower(), text)
    if element_type(kind) is None:
        return text
    if text.lstrip().startswith("["):
        return parse_yaml(text, _COMMAND_LINE)
    return [part.strip() for part in text.split(",") if part.strip()]
