"""Report what is installed beside what the tests were run with, and what the hardware offers: for bug reports.

python tools/environment.py [--json]
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from photon_train.cli import main_wrapper
from photon_train.data.pretrain import fast_dtype
from photon_train.evaluation.report import machine
from photon_train.manifest import git_commit

CONSTRAINTS = Path(__file__).resolve().parents[1] / "constraints.txt"
PACKAGES = ("torch", "triton", "transformers", "peft", "accelerate", "deepspeed", "wandb", "safetensors", "tokenizers")
OPTIONAL = ("liger_kernel", "lm_eval", "kvpress", "flash_attn", "vllm")


def tested_versions(text: str) -> dict[str, str]:
    """Package -> version or range, from the lines of a constraints file."""
    pins = (re.match(r"([A-Za-z0-9_.-]+?)((?:[=<>!~]=?)[^;#]+)", line) for line in text.splitlines())
    return {pin[1].lower().replace("-", "_"): pin[2].strip() for pin in pins if pin}


def report() -> dict[str, Any]:
    """Versions (installed and tested), the machine, the accelerators, and which optional parts can run."""
    tested = tested_versions(CONSTRAINTS.read_text(encoding="utf-8"))
    packages = {}
    for name in (*PACKAGES, *OPTIONAL):
        try:
            packages[name] = {"installed": version(name), "tested": tested.get(name)}
        except PackageNotFoundError:
            packages[name] = {"installed": None, "tested": tested.get(name)}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {
        "python": platform.python_version(),
        "commit": git_commit(),
        "packages": packages,
        **machine(),
        "cuda": torch.version.cuda,
        "gpu_memory_gib": [
            round(torch.cuda.get_device_properties(index).total_memory / 2**30, 1)
            for index in range(torch.cuda.device_count())
        ],
        "training_dtype": str(fast_dtype(device)).removeprefix("torch."),
        "triton_backend": _triton(device),
        "wandb": "key found: online" if _has_wandb_key() else "no key: runs are logged offline",
    }


def _triton(device: torch.device) -> str:
    if importlib.util.find_spec("triton") is None:
        return "not installed: pip install 'photon-train[serve]'"
    if device.type == "cuda":
        return "compiles for the GPU"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "interpreter (slow)"
    return "no GPU: use --backend torch, or TRITON_INTERPRET=1 for a check"


def _has_wandb_key() -> bool:
    netrc = Path(os.environ.get("NETRC", Path.home() / ".netrc"))
    return bool(os.environ.get("WANDB_API_KEY")) or (netrc.is_file() and "wandb" in netrc.read_text(errors="ignore"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON")
    found = report()
    if parser.parse_args().json:
        print(json.dumps(found, indent=1))
        return
    table = Table("Package", "Installed", "Tested")
    for name, versions in found.pop("packages").items():
        if versions["installed"] or versions["tested"]:
            table.add_row(name, versions["installed"] or "-", (versions["tested"] or "-").removeprefix("=="))
    console = Console(highlight=False)
    console.print(table)
    for name, value in found.items():
        if value not in (None, []):
            console.print(f"{name}: {value}")


if __name__ == "__main__":
    main_wrapper(main)
