"""Compile every kernel ahead of time and report the resources it takes: no GPU is needed.

    python -m photon_kernels.aot sm_80 sm_90 --json report.json

prints one JSON object per kernel, configuration and target, and fails where registers spill to memory. That, and what
the compiler rejects, shows here long before a kernel meets a GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from photon_kernels._compile_case import CompileCase

# Largest shared memory of one program in bytes (CUDA C++ Programming Guide, "Compute Capabilities").
SHARED_LIMITS = {"sm_80": 163 * 1024, "sm_90": 227 * 1024}


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

    @property
    def fits(self) -> bool:
        """Whether nothing is spilled and the shared memory is enough."""
        return self.spill_bytes == 0 and self.shared_bytes <= SHARED_LIMITS[self.target]


def all_cases() -> Iterator[CompileCase]:
    """The cases of every operation."""
    from photon_kernels.cache_append.triton import compile_cases as append_cases
    from photon_kernels.chunker.triton import compile_cases as chunker_cases
    from photon_kernels.latent_decode.cases import compile_cases as latent_cases
    from photon_kernels.latent_outputs.triton import compile_cases as output_cases
    from photon_kernels.latent_queries.triton import compile_cases as query_cases
    from photon_kernels.paged_decode.triton import compile_cases as paged_cases
    from photon_kernels.unit_pack.triton import compile_cases as pack_cases
    from photon_kernels.window_decode.triton import compile_cases as window_cases

    yield from window_cases()
    yield from paged_cases()
    yield from query_cases()
    yield from latent_cases()
    yield from output_cases()
    yield from chunker_cases()
    yield from append_cases()
    yield from pack_cases()


def _leaves(kind: str | tuple, path: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], str]]:
    """The types in an argument's type, with the path to each."""
    if isinstance(kind, str):
        yield path, kind
        return
    for index, part in enumerate(kind):
        yield from _leaves(part, (*path, index))


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
    aligned = (
        path
        for index, name in enumerate(arguments)
        for path, kind in _leaves(case.types.get(name, ()), (index,))
        if kind.startswith("*") or "stride" in name
    )
    source = ASTSource(
        fn=case.kernel,
        signature={name: case.types.get(name, "constexpr") for name in arguments},
        constexprs=dict(case.constants),
        attrs={path: [["tt.divisibility", 16]] for path in aligned},
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


def environment() -> dict[str, str | None]:
    """Versions, and the commit of the working tree that this file lies in (None outside one)."""
    import torch
    import triton

    folder = Path(__file__).parent
    described = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=folder, capture_output=True, text=True)
    commit = described.stdout.strip() if described.returncode == 0 else None
    return {"triton": triton.__version__, "torch": torch.__version__, "commit": commit}


def write_json(path: Path, content: Any) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def main() -> None:
    """Print one JSON line per case and target; fail on a spill or too much shared memory."""
    parser = argparse.ArgumentParser(description="Compile every kernel and report the resources it takes.")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(SHARED_LIMITS)}; default: all")
    parser.add_argument("--json", type=Path, help="also write the whole report, with versions and commit, to this file")
    arguments = parser.parse_args()
    targets = arguments.targets or list(SHARED_LIMITS)
    unknown = sorted(set(targets) - set(SHARED_LIMITS))
    if unknown:
        parser.error(f"unknown targets {unknown}; known: {', '.join(SHARED_LIMITS)}")
    reports = []
    for target, case in itertools.product(targets, all_cases()):
        reports.append(compile_case(case, target))
        print(json.dumps(dataclasses.asdict(reports[-1])), flush=True)
    if arguments.json is not None:
        write_json(arguments.json, {**environment(), "kernels": [dataclasses.asdict(report) for report in reports]})
    wrong = [report for report in reports if not report.fits]
    for report in wrong:
        print(
            f"{report.name} for {report.target}: {report.spill_bytes} bytes spilled, {report.shared_bytes} bytes of "
            f"shared memory (limit {SHARED_LIMITS[report.target]})",
            file=sys.stderr,
        )
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
