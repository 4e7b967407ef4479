"""`RunConfig` as YAML. Scalars follow YAML 1.2: ``1e-4`` is a number, ``no`` and dates are text."""

from __future__ import annotations

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from photon_train.config.keys import CONFIG
from photon_train.config.schema import RunConfig
from photon_train.errors import PhotonError


class _Loader(yaml.SafeLoader):
    """Reads YAML 1.2 scalars; a key that stands twice in a mapping is an error."""

    yaml_implicit_resolvers: dict[str, Any] = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} stands twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes what `_Loader` would read as something else."""

    yaml_implicit_resolvers: dict[str, Any] = {}


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|false)$", re.I), list("tTfF"))
    _class.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"^(?:~|null|)$", re.I), ["~", "n", "N", ""])
    _class.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?(?:0|[1-9]\d*)$"), list("-+0123456789"))
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(?:\.\d+|\d+\.\d*(?:[eE][-+]?\d+)?|\d+[eE][-+]?\d+)$"),
        list("-+.0123456789"),
    )


def read_yaml(path: Path) -> Any:
    """Return the content of a YAML file; an empty file is an empty mapping.

    Raises:
        PhotonError: if the file is missing, unreadable or no valid YAML.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PhotonError(f"cannot read the configuration file {path}: {error}") from error
    return parse_yaml(text, str(path))


def parse_yaml(text: str, source: str) -> Any:
    """Return the content of YAML text; nothing at all is an empty mapping.

    Raises:
        PhotonError: naming `source` and the line if the text is no valid YAML.
    """
    try:
        content = yaml.load(text, Loader=_Loader)  # a SafeLoader: builds plain values only
    except yaml.YAMLError as error:
        raise PhotonError(f"{source} is not valid YAML: {error}") from error
    return {} if content is None else content


def to_dict(config: RunConfig) -> dict[str, Any]:
    """`config` as plain dictionaries and lists; fields declared with ``exclude`` (the access token) are left out."""
    return CONFIG.dump_python(config)


def to_yaml(config: RunConfig) -> str:
    """`config` as YAML that ``--config`` reads back to an equal configuration (the access token is left out)."""
    return yaml.dump(to_dict(config), Dumper=_Dumper, sort_keys=False, width=120)
