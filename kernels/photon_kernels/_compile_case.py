"""What an operation asks to be compiled ahead of time; its `triton.py` makes these, `aot.py` compiles them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class CompileCase:
    """One kernel in one configuration.

    Attributes:
        name: Shown in the report; unique.
        kernel: The function decorated with ``triton.jit``.
        types: Triton's type names of the arguments that are passed at launch, such as ``*bf16`` or ``i32``; a tuple of
            them for an argument that is a tuple.
        constants: Values of the ``constexpr`` arguments.
        num_warps: Warps per program.
        num_stages: Depth of the software pipeline.
    """

    name: str
    kernel: Any
    types: Mapping[str, Any]
    constants: Mapping[str, Any]
    num_warps: int
    num_stages: int
