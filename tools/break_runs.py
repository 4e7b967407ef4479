"""Conversions that are killed, interrupted, and run out of disk; what is lost, and what is said.

    python tools/break_runs.py --output benchmarks/reliability/runs.json

A tiny model is converted, trained and exported; a run that was broken is resumed until it ends, and its exported
weights must be those of the run that nobody broke, bit for bit. Disks are file systems in memory, for which one must be
root (`--no-disks` leaves them out).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lib.tiny_inputs import make_inputs
from photon_train.cli import main_wrapper
from photon_train.errors import PhotonError
from photon_train.evaluation.report import write_rows

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = {
    "photon.window": 16,
    "train.seq_len": 64,
    "train.batch_size": 2,
    "train.max_steps": 8,
    "train.eval_sequences": 4,
    "train.save_every": 1,
    "train.mixed_precision": "no",
    "train.dense_baseline": "false",
    "lora.rank": 4,
    "lora.dropout": 0.1,
    "export.sample_tokens": 4,
    "tracking.tracker": "none",
}
LONG_LINE = 50 * 2**20  # bytes
ATTEMPTS = 20  # until a run must have ended


class Runs:
    """Runs of one conversion.

    Attributes:
        tried: Times that a process was started; faults: what went wrong, in words.
    """

    def __init__(self, model: Path, text: Path) -> None:
        self.model, self.text = model, text
        self.tried, self.faults = 0, []

    def start(self, output: Path, text: Path | None = None) -> subprocess.Popen:
        """Begin the run, or go on with it."""
        self.tried += 1
        settings = {"model": self.model, "data": text or self.text, "output": output, **SETTINGS}
        command = [sys.executable, "-m", "photon_train.commands.convert", "--resume"]
        command += [f"--{key}={value}" for key, value in settings.items()]
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, cwd=ROOT, **pipes)

    def finish(self, output: Path, text: Path | None = None) -> float:
        """Run to the end; the seconds it took."""
        began = time.perf_counter()
        process = self.start(output, text)
        said = process.communicate()[1]
        if process.returncode:
            self.faults.append(f"exit status {process.returncode}: {said.strip().splitlines()[-1:]}")
        return time.perf_counter() - began

    def refused(self, output: Path, what: str) -> None:
        """The run must fail, with one line that says why."""
        process = self.start(output)
        self.judge(process.communicate()[1], process.returncode, what)

    def judge(self, said: str, status: int, what: str) -> None:
        errors = [line for line in said.splitlines() if line.startswith("error")]
        if status == 0 or "Traceback" in said or len(errors) != 1:
            self.faults.append(f"{what}: exit status {status}, {len(errors)} lines of error, {said.strip()[-300:]}")

    def same(self, output: Path, expected: str, what: str) -> None:
        """What was exported is what nobody's breaking would have exported, and nothing half-written is left."""
        if not (output / "export").is_dir() or exported(output) != expected:
            self.faults.append(f"{what}: another export")
        if left := [path.name for path in output.rglob(".*") if path.name != ".lock"]:
            self.faults.append(f"{what}: left over: {left[0]}")


def exported(output: Path) -> str:
    """Hash of the exported weights."""
    return hashlib.sha256((output / "export" / "model.safetensors").read_bytes()).hexdigest()


def break_at_random(runs: Runs, folder: Path, how: int, count: int, seconds: float, expected: str) -> None:
    """Send a signal at random moments, resume, until the run has ended."""
    draw, broken, number = random.Random(how), 0, 0
    while broken < count:
        output = folder / f"signal-{how}-{number}"
        for _ in range(ATTEMPTS):
            process = runs.start(output)
            try:
                said = process.communicate(timeout=draw.uniform(0.2, 1.0) * seconds)[1]
            except subprocess.TimeoutExpired:
                process.send_signal(how)
                said = process.communicate()[1]
                broken += 1
                if how == signal.SIGINT and "Traceback" in said:
                    runs.faults.append(f"SIGINT: a traceback: {said.strip().splitlines()[-1]}")
            if process.returncode == 0 or broken >= count:
                break
        runs.finish(output)
        runs.same(output, expected, f"signal {how}")
        number += 1


@contextmanager
def disk(directory: Path, size: str) -> Iterator[Path]:
    """A file system of `size`."""
    directory.mkdir()
    mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(directory))
    try:
        yield directory
    finally:
        subprocess.run(["umount", str(directory)], check=True)


def mount(*arguments: str) -> None:
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise PhotonError(f"mount: {done.stderr.strip()}: be root, or leave the disks out (--no-disks)")


def fill_disks(runs: Runs, folder: Path, expected: str) -> None:
    """On disks that fill up at several moments: one line, and a run that ends once there is room."""
    for size in ("200k", "900k", "1500k", "2300k"):
        with disk(folder / f"disk-{size}", size) as place:
            runs.refused(place / "run", f"a disk of {size}")
            mount("-o", "remount,size=200m", str(place))
            runs.finish(place / "run")
            runs.same(place / "run", expected, f"a disk of {size}")


def write_protect(runs: Runs, folder: Path, expected: str) -> None:
    """On a disk that cannot be written, from the start and after some steps."""
    with disk(folder / "protected", "200m") as place:
        mount("-o", "remount,ro", str(place))
        runs.refused(place / "run", "a read-only disk")
        mount("-o", "remount,rw", str(place))
        process = runs.start(place / "run")
        while process.poll() is None and not (place / "run" / "checkpoints" / "photon").is_dir():
            time.sleep(0.05)
        process.kill()
        process.communicate()
        mount("-o", "remount,ro", str(place))
        runs.refused(place / "run", "a disk that has become read-only")
        mount("-o", "remount,rw", str(place))
        runs.finish(place / "run")
        runs.same(place / "run", expected, "a disk that was read-only")


def read_a_long_line(runs: Runs, folder: Path) -> float:
    """A record of JSON in one line of 50 MB, beside short ones."""
    text = folder / "long.jsonl"
    words = "one more word of a line that does not end "
    with text.open("w", encoding="utf-8") as file:
        for record in [*(f"short {number} " * 40 for number in range(40)), words * (LONG_LINE // len(words))]:
            file.write(json.dumps({"text": record}) + "\n")
    return runs.finish(folder / "long-line", text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON to write")
    parser.add_argument("--kills", type=int, default=6, help="kill -9 at random moments")
    parser.add_argument("--interrupts", type=int, default=3, help="SIGINT at random moments")
    parser.add_argument("--no-disks", action="store_true", help="leave out what needs file systems of its own")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    folder = Path(tempfile.mkdtemp(prefix="break-runs-"))
    try:
        runs = Runs(*make_inputs(folder))
        seconds = runs.finish(folder / "straight")
        if runs.faults:
            raise PhotonError(f"the run that nobody breaks fails: {runs.faults[0]}")
        expected = exported(folder / "straight")
        rounds = {
            "kill -9": lambda: break_at_random(runs, folder, signal.SIGKILL, options.kills, seconds, expected),
            "SIGINT": lambda: break_at_random(runs, folder, signal.SIGINT, options.interrupts, seconds, expected),
        }
        if not options.no_disks:
            rounds |= {
                "full disks": lambda: fill_disks(runs, folder, expected),
                "read-only disks": lambda: write_protect(runs, folder, expected),
            }
        rounds["a line of 50 MB"] = lambda: read_a_long_line(runs, folder)  # takes gigabytes and minutes
        for name, work in rounds.items():
            runs.tried, runs.faults = 0, []
            work()
            rows.append({"round": name, "runs_started": runs.tried, "faults": len(runs.faults), "found": runs.faults})
            print(json.dumps(rows[-1]), flush=True)
            write_rows(options.output, rows, command=" ".join(["python", *sys.argv]))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main_wrapper(main)
