"""Strict assignment of plain values (from YAML or text) to the dataclass tree of `photon_train.config`."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterator
from typing import Any

from photon_train.config import RunConfig
from photon_train.errors import PhotonError

_NAMES = {int: "a whole number", float: "a finite number", bool: "true or false", str: "text (quote it in YAML)"}


def field_types(kind: Any) -> dict[str, Any]:
    """Field names of a dataclass with their declared types."""
    return typing.get_type_hints(kind)


def without_none(kind: Any) -> Any:
    """T for ``T | None``, else `kind` itself."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return next(option for option in typing.get_args(kind) if option is not type(None))
    return kind


def element_type(kind: Any) -> Any:
    """T for ``list[T]`` and ``list[T] | None``, else None."""
    kind = without_none(kind)
    return typing.get_args(kind)[0] if typing.get_origin(kind) is list else None


def merge(target: Any, values: Any, path: str, source: str) -> None:
    """Write a mapping into the dataclass instance `target`, whose dotted key is `path` ("" for the root).

    Raises:
        PhotonError: for an unknown key or a value of the wrong type.
    """
    if not isinstance(values, dict):
        raise PhotonError(f"{path or 'the top level'} in {source} must be a mapping of settings, not {values!r}")
    kinds = field_types(type(target))
    for name, value in values.items():
        key = f"{path}.{name}" if path else str(name)
        if name not in kinds:
            raise unknown_key(key, source)
        if dataclasses.is_dataclass(kinds[name]):
            merge(getattr(target, name), value, key, source)
        else:
            setattr(target, name, coerce(value, kinds[name], key, source))


def coerce(value: Any, kind: Any, key: str, source: str) -> Any:
    """Return `value` as the declared type `kind`; text that spells a number counts as the number.

    Raises:
        PhotonError: naming key, value, source and the expected type.
    """
    if value is None and kind is not without_none(kind):
        return None
    kind = without_none(kind)
    element = element_type(kind)
    if element is not None and isinstance(value, list):
        return [coerce(item, element, f"{key}.{index}", source) for index, item in enumerate(value)]
    if dataclasses.is_dataclass(kind):
        instance = kind()
        merge(instance, value, key, source)
        return instance
    if kind in (int, float):
        number = _number(value)
        if math.isfinite(number) and (kind is float or number == int(number)):
            return value if isinstance(value, kind) else kind(number)
    elif kind in (bool, str) and isinstance(value, kind):
        return value
    raise PhotonError(f"{key} in {source} is {value!r}; expected {_describe(kind)}")


def _number(value: Any) -> float:
    """`value` as a float; NaN where it is no number. Booleans are none."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return math.nan
    try:
        return float(value)
    except (ValueError, OverflowError):
        return math.nan


def _describe(kind: Any) -> str:
    return _NAMES.get(kind) or f"a list, each item {_NAMES.get(element_type(kind), 'a mapping')}"


def all_keys(kind: Any = RunConfig, path: str = "") -> Iterator[str]:
    """Every dotted key; items of a list of groups appear with index 0."""
    for name, field_type in field_types(kind).items():
        if dataclasses.is_dataclass(field_type):
            yield from all_keys(field_type, f"{path}{name}.")
            continue
        yield path + name
        element = element_type(field_type)
        if dataclasses.is_dataclass(element):
            yield from all_keys(element, f"{path}{name}.0.")


def unknown_key(key: str, source: str) -> PhotonError:
    """The error for a key that does not exist, with the closest one that does."""
    keys = list(all_keys())
    leaf = key.rpartition(".")[2]
    same_leaf = [known for known in keys if known.rpartition(".")[2] == leaf]
    groups = sorted({known.rpartition(".")[0] for known in keys} - {""})
    close = same_leaf or difflib.get_close_matches(key, keys + groups, n=1)
    hint = f"did you mean {close[0]!r}?" if close else "--help lists them all"
    return PhotonError(f"unknown setting {key!r} in {source}: {hint}")
