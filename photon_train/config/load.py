"""From a command line to a checked `RunConfig`: defaults < YAML (``--config``) < dotted overrides.

All are merged as plain values, which pydantic checks once. Nothing heavy is imported, so ``--help`` answers at once.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from photon_train.config.help import format_help
from photon_train.config.keys import CONFIG, expected, find, unknown_key
from photon_train.config.schema import RunConfig
from photon_train.config.yaml import parse_yaml, read_yaml
from photon_train.errors import PhotonError
from photon_train.files import expand_path

_COMMAND_LINE = "on the command line"
_BOOLEANS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
# A list grows to the index that an override names; the bound turns a slip of the finger into an error.
_MAX_INDEX = 15


def load_config(argv: list[str] | None, *, prog: str, description: str, defaults: RunConfig | None = None) -> RunConfig:
    """Read the command line of a recipe.

    Args:
        argv: Arguments without the program's name; None takes `sys.argv`.
        prog: Program name shown by ``--help``.
        description: What the program does, shown by ``--help``.
        defaults: Starting values; None takes those of `RunConfig`.

    Returns:
        A new, checked configuration.

    Raises:
        PhotonError: one line that names the key, where it stands and what is allowed, for an unknown key, a value that
            is not allowed, or a file that cannot be read.
        SystemExit: with status 0 after ``--help``.
    """
    defaults = defaults or RunConfig()
    arguments = sys.argv[1:] if argv is None else argv
    if "--help" in arguments or "-h" in arguments:
        print(format_help(defaults, prog=prog, description=description))
        raise SystemExit(0)
    files, overrides = _split_arguments(arguments)
    values, sources = dataclasses.asdict(defaults), {}
    for file in files:
        _merge(values, read_yaml(file), "", f"in {file}", sources)
    for key, text in overrides:
        _override(values, key, text)
        sources[key] = _COMMAND_LINE
    return check(values, sources)


def check(values: dict[str, Any], sources: dict[str, str]) -> RunConfig:
    """The configuration of plain values.

    Args:
        values: Nested mappings, as in YAML.
        sources: Dotted keys to where each was set, for errors.

    Raises:
        PhotonError: for the first value found wrong.
    """
    try:
        return CONFIG.validate_python(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    key, kind = ".".join(map(str, first["loc"])), first["type"]
    prefixes = [key.rsplit(".", count)[0] for count in range(key.count(".") + 1)]
    source = next((sources[prefix] for prefix in prefixes if prefix in sources), "in the defaults")
    field = find(key)
    if field is None:
        raise unknown_key(key, source)
    if kind == "missing":
        group, _, name = key.rpartition(".")
        raise PhotonError(f"{group} needs a {name}")
    if kind == "value_error" and "properties" in field:
        raise PhotonError(str(first["ctx"]["error"]))
    value: Any = values
    for part in first["loc"]:
        value = value[part]
    raise _wrong(key, source, value, field)


def _wrong(key: str, source: str, value: Any, field: dict[str, Any]) -> PhotonError:
    return PhotonError(f"{key or 'the top level'} {source} is {value!r}; expected {expected(field)}")


def _merge(values: dict[str, Any], content: Any, path: str, source: str, sources: dict[str, str]) -> None:
    """Write a YAML mapping into the plain values of the group `path` ("" or a dotted key with a dot at its end)."""
    if not isinstance(content, dict):
        raise _wrong(path[:-1], source, content, find(path[:-1]))
    for name, value in content.items():
        if isinstance(values.get(name), dict):
            _merge(values[name], value, f"{path}{name}.", source, sources)
        else:
            values[name], sources[f"{path}{name}"] = value, source


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
        field = {"type": "string"} if key == "config" else find(key)
        if field is None or (name[-1:].isdecimal() and "properties" not in field):  # no items of plain lists
            raise unknown_key(key, _COMMAND_LINE)
        if not has_value:
            if rest and not rest[0].startswith("--"):
                text = rest.pop(0)
            elif field["type"] == "boolean":
                text = "true"
            else:
                raise PhotonError(f"--{name} needs a value (one that starts with -- is written --{name}=VALUE)")
        if "properties" in field:
            raise PhotonError(f"--{key} is a group of settings: give --{key}.NAME VALUE (see --help)")
        if key == "config":
            files.append(Path(expand_path(text)))
        else:
            overrides.append((key, text))
    return files, overrides


def _override(values: dict[str, Any], key: str, text: str) -> None:
    """Set one dotted key from its text; a list of groups grows to the index that the key names."""
    *parents, name = key.split(".")
    owner: Any = values
    for parent in parents:
        if isinstance(owner, list):
            index = int(parent)
            if index > _MAX_INDEX:
                raise PhotonError(f"--{key}: the index {index} is too large (at most {_MAX_INDEX})")
            owner.extend({} for _ in range(index + 1 - len(owner)))
            owner = owner[index]
        elif isinstance(owner, dict):
            owner = owner[parent]
    if isinstance(owner, dict):  # else a file has something else in its place, which `check` refuses
        owner[name] = _plain_value(text, find(key))


def _plain_value(text: str, field: dict[str, Any]) -> Any:
    """Give the text of an override the shape that the same value has in YAML."""
    if field["nullable"] and text.lower() in ("none", "null"):
        return None
    if field["type"] == "boolean":
        return _BOOLEANS.get(text.lower(), text)
    if "items" not in field:
        return text
    if text.lstrip().startswith("["):
        return parse_yaml(text, "the command line")
    return [part.strip() for part in text.split(",") if part.strip()]
