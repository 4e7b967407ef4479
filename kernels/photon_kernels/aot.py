"""Compile every kernel ahead of time and report the resources it takes: no GPU is needed.

    python -m photon_kernels.aot sm_80 sm_90

prints one JSON object per kernel, configuration and target. What the compiler rejects, and registers that spill to
memory, show here long before a kernel meets a GPU.
"""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

# Largest shared memory of one program in bytes (CUDA C++ Programming Guide, "Compute Capabilities").
SHARED_LIMITS = {"sm_80": 163 * 1024, "sm_90": 227 * 1024}


@dataclasses.dataclass(frozen=True)
class CompileCase:
    """One kernel in one configuration.

    Attributes:
        name: Shown in the report; unique.
        kernel: The function decorated with ``triton.jit``.
        types: Triton's type names of the arguments that are passed at launch, such as ``*bf16`` or ``i32``.
        constants: Values of the ``constexpr`` arguments.
        num_warps: Warps per program.
        num_stages: Depth of the software pipeline.
    """

    name: str
    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    num_warps: int
    num_stages: int


@dataclasses.dataclass(frozen=True)
class ResourceReport:
    """What one program of a compiled kernel takes.

    Attributes:
        name: The case's name.
        target: Such as ``sm_90``.
        registers: Registers per thread.
        spill_bytes: Local memory per thread. The kernels have no local arrays, so this is what registers spilled.
        shared_bytes: Shared memory per program.
        num_warps: Warps per program.
        num_stages: Depth of the software pipeline.
    """

    name: str
    target: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    num_warps: int
    num_stages: int


def all_cases() -> Iterator[CompileCase]:
    """The cases of every operation."""
    from photon_kernels.chunker.triton import compile_cases as chunker_cases
    from photon_kernels.summary_decode.triton import compile_cases as summary_cases
    from photon_kernels.window_decode.triton import compile_cases as window_cases

    yield from window_cases()
    yield from summary_cases()
    yield from chunker_cases()


def compile_case(case: CompileCase, target: str) -> ResourceReport:
    """Compile one case for ``sm_80``, ``sm_90``, ... and measure the machine code.

    Pointers and strides are taken to be divisible by 16, as Triton finds them at launch for real models.

    Raises:
        RuntimeError: ``TRITON_INTERPRET`` was set when triton was imported.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptxas
    from triton.compiler import ASTSource

    if not isinstance(case.kernel, triton.JITFunction):
        raise RuntimeError("kernels are interpreted in this process: unset TRITON_INTERPRET to compile them")
    capability = int(target.removeprefix("sm_"))
    arguments = case.kernel.arg_names
    aligned = [name for name, kind in case.types.items() if kind.startswith("*") or name.startswith("stride_")]
    source = ASTSource(
        fn=case.kernel,
        signature={name: case.types.get(name, "constexpr") for name in arguments},
        constexprs=dict(case.constants),
        attrs={(arguments.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": case.num_warps, "num_stages": case.num_stages},
    )
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        # It lies beside the assembler that triton ships.
        tool = Path(get_ptxas(capability).path).with_name("cuobjdump")
        usage = subprocess.run([str(tool), "-res-usage", str(cubin)], capture_output=True, text=True, check=True).stdout
    sizes = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return ResourceReport(
        name=case.name,
        target=target,
        registers=sizes["REG"],
        spill_bytes=sizes["STACK"] + sizes["LOCAL"],
        shared_bytes=compiled.metadata.shared,
        num_warps=case.num_warps,
        num_stages=case.num_stages,
    )


def main(targets: list[str]) -> None:
    """Print one JSON line per case and target (all known targets where none is given)."""
    for target in targets or SHARED_LIMITS:
        for case in all_cases():
            print(json.dumps(dataclasses.asdict(compile_case(case, target))), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
