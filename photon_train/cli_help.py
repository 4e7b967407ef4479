"""The text of ``--help``: every setting with its meaning (from the dataclass docstrings), type and default."""

from __future__ import annotations

import dataclasses
import inspect
import re
import shutil
import textwrap
from typing import Any

from photon_train.config import RunConfig
from photon_train.config_values import element_type, field_types, without_none

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
    _add_group(lines, config, "", width)
    return "\n".join(lines)


def field_docs(kind: type) -> dict[str, str]:
    """Meaning of each field: the ``Attributes:`` section of the dataclass docstring."""
    docs: dict[str, str] = {}
    name = ""
    _, _, section = inspect.cleandoc(kind.__doc__ or "").partition("Attributes:\n")
    for line in section.splitlines():
        entry = re.match(r"    (\w+): (.*)", line)
        if entry:
            name = entry[1]
            docs[name] = entry[2]
        elif line.startswith("     "):
            docs[name] += " " + line.strip()
        else:
            break
    return docs


def _add_group(lines: list[str], group: Any, path: str, width: int, index: str = "") -> None:
    docs = field_docs(type(group))
    nested = []
    for name, kind in field_types(type(group)).items():
        if dataclasses.is_dataclass(kind):
            nested.append((getattr(group, name), f"{path}{name}."))
            continue
        lines.append(f"  --{path}{index}{name} {_placeholder(kind)}")
        text = f"{docs[name]} (default: {_show(getattr(group, name))})"
        lines.append(textwrap.fill(text, width, initial_indent=" " * 12, subsequent_indent=" " * 12))
        element = element_type(kind)
        if dataclasses.is_dataclass(element):
            _add_group(lines, element(), f"{path}{name}.", width, index="N.")
    for child, child_path in nested:
        lines.append(f"\n{child_path[:-1]}: {inspect.cleandoc(type(child).__doc__ or '').splitlines()[0]}")
        _add_group(lines, child, child_path, width)


def _placeholder(kind: Any) -> str:
    element = element_type(kind)
    if dataclasses.is_dataclass(element):
        return "LIST"
    if element is not None:
        return f"{element.__name__.upper()},..."
    return {bool: "[true|false]", str: "TEXT"}.get(without_none(kind), without_none(kind).__name__.upper())


def _show(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value)) or "empty"
    if value is None:
        return "unset"
    return str(value).lower() if isinstance(value, bool) else str(value)
