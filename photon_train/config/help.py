"""The text of ``--help``: every setting with its meaning, type, bounds and default, from the declaration."""

from __future__ import annotations

import shutil
import textwrap
from typing import Any

from photon_train.config.keys import ROOT, limits
from photon_train.config.schema import MOST_COUNT, RunConfig

_USAGE = """\
usage: {prog} [--config FILE.yaml] [--KEY VALUE ...]

{description}

Settings are taken from the defaults below, then from the YAML file, then from the command line. Keys are dotted
(--train.max_steps 200); a level of the hierarchy is named by its index (--photon.levels.0.chunk_size 4); a list is
written 0,2 or [0,2]; a true/false setting may stand without a value; `none` unsets.

  --help    show this and stop
  --config FILE.yaml
            read settings from a YAML file with the same keys
"""


def format_help(config: RunConfig, *, prog: str, description: str) -> str:
    """Return the help text, with the values of `config` as defaults."""
    width = min(shutil.get_terminal_size().columns, 110)
    lines = [_USAGE.format(prog=prog, description=textwrap.fill(description, width))]
    _add_group(lines, ROOT, config, "", width)
    return "\n".join(lines)


def _add_group(lines: list[str], group: dict[str, Any], values: Any, path: str, width: int) -> None:
    """Add the settings of a group; `values` holds their defaults, or is None for an item of a list."""
    nested = []
    for name, field in group["properties"].items():
        value = field.get("default") if values is None else getattr(values, name)
        if "properties" in field:
            nested.append((field, value, f"{path}{name}."))
            continue
        lines.append(f"  --{path}{name} {_placeholder(field)}")
        default = "required" if name in group.get("required", ()) else f"default: {_show(value)}"
        text = f"{' '.join(field['description'].split())} ({'; '.join([*limits(field, MOST_COUNT), default])})"
        lines.append(textwrap.fill(text, width, initial_indent=" " * 12, subsequent_indent=" " * 12))
        if "properties" in field.get("items", {}):
            _add_group(lines, field["items"], None, f"{path}{name}.N.", width)
    for child, value, child_path in nested:
        lines.append(f"\n{child_path[:-1]}: {child['description']}")
        _add_group(lines, child, value, child_path, width)


def _placeholder(field: dict[str, Any]) -> str:
    if "enum" in field:
        return "|".join(map(str, field["enum"]))
    if "items" in field:
        return "LIST" if "properties" in field["items"] else f"{_placeholder(field['items'])},..."
    return {"integer": "INT", "number": "FLOAT", "boolean": "[true|false]", "string": "TEXT"}[field["type"]]


def _show(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value)) or "empty"
    if value is None:
        return "unset"
    return str(value).lower() if isinstance(value, bool) else str(value)
