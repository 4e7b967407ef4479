"""What the declaration says about each dotted key, read from its JSON schema; and the known key nearest to a slip."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator
from typing import Any

from pydantic import TypeAdapter

from photon_train.config.schema import RunConfig
from photon_train.errors import PhotonError

CONFIG = TypeAdapter(RunConfig)
_WORDS = {"integer": "a whole number", "number": "a finite number", "boolean": "true or false"}
_WORDS |= {"string": "text (quote it in YAML)", "object": "a mapping of settings"}
_LIMITS = {"minimum": "at least", "exclusiveMinimum": "greater than"}
_LIMITS |= {"maximum": "at most", "exclusiveMaximum": "smaller than"}


def _resolve(node: dict[str, Any], groups: dict[str, Any]) -> dict[str, Any]:
    """A node of the JSON schema with what it refers to put in; `nullable` for a choice between a type and null."""
    inner = next((option for option in node.get("anyOf", ()) if option.get("type") != "null"), {})
    reference = groups[node["$ref"].rpartition("/")[2]] if "$ref" in node else {}
    inner = _resolve(inner or reference, groups) if inner or reference else {}
    result = {**inner, "nullable": "anyOf" in node, **{k: v for k, v in node.items() if k not in ("anyOf", "$ref")}}
    if "items" in node:
        result["items"] = _resolve(node["items"], groups)
    if "properties" in node:
        result["properties"] = {name: _resolve(field, groups) for name, field in node["properties"].items()}
    return result


_schema = CONFIG.json_schema()
# The declaration: a group has `properties`, a list `items`, a value `type` or `enum`; `description`, bounds, marks.
ROOT: dict[str, Any] = _resolve(_schema, _schema["$defs"])


def find(key: str) -> dict[str, Any] | None:
    """The declaration of a dotted key such as ``photon.levels.0.chunk_size``; None for a key that does not exist."""
    node: dict[str, Any] | None = ROOT
    for part in key.split(".") if key else ():
        node = node.get("items") if part.isdecimal() else node.get("properties", {}).get(part)
        if node is None:
            return None
    return node


def all_keys(node: dict[str, Any] = ROOT, path: str = "", on_resume: str = "") -> Iterator[tuple[str, str]]:
    """Every dotted key with its `on_resume` mark (a group's holds for all in it); items of lists have index 0."""
    for name, field in node["properties"].items():
        mark = field.get("on_resume", on_resume)
        if "properties" not in field:
            yield path + name, mark
        if "properties" in field.get("items", {}):
            yield from all_keys(field["items"], f"{path}{name}.0.", mark)
        elif "properties" in field:
            yield from all_keys(field, f"{path}{name}.", mark)


def limits(node: dict[str, Any], largest: float = math.inf) -> list[str]:
    """The bounds of a number, in words; those from `largest` on are left out."""
    found = ((words, node[name]) for name, words in _LIMITS.items() if name in node)
    return [f"{words} {value}" for words, value in found if value < largest]


def expected(node: dict[str, Any]) -> str:
    """What a value must be, in words."""
    if "enum" in node:
        return f"one of {', '.join(map(str, node['enum']))}"
    listed = f"a list, each item {expected(node['items'])}" if "items" in node else ""
    return ", ".join([node.get("expected") or listed or _WORDS[node["type"]], *limits(node)])


def unknown_key(key: str, source: str) -> PhotonError:
    """The error for a key that does not exist, with the closest one that does."""
    keys = [known for known, _ in all_keys()]
    leaf = key.rpartition(".")[2]
    same_leaf = [known for known in keys if known.rpartition(".")[2] == leaf]
    groups = sorted({known.rpartition(".")[0] for known in keys} - {""})
    close = difflib.get_close_matches(key, same_leaf, n=1, cutoff=0.0) if same_leaf else None
    close = close or difflib.get_close_matches(key, keys + groups, n=1)
    hint = f"did you mean {close[0]!r}?" if close else "--help lists them all"
    return PhotonError(f"unknown setting {key!r} {source}: {hint}")
