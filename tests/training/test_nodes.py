"""Several machines: two launchers with two gloo processes each under ZeRO-2; killed, and continued on one of them."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("run_node.py")


def _launch(nodes: int, output: Path, hang_after: int) -> list[subprocess.Popen]:
    """A launcher for each node, in a process group of its own; two processes a node share eight sequences a step."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in (".", "kernels", "tests/support")),
    }
    launchers = []
    for node in range(nodes):
        command = [sys.executable, "-m", "accelerate.commands.launch"]
        command += ["--config_file", str(ROOT / "accelerate_configs" / "cpu_zero2.yaml"), "--same_network"]
        command += ["--num_machines", str(nodes), "--num_processes", str(2 * nodes), "--machine_rank", str(node)]
        command += ["--main_process_ip", "127.0.0.1", "--main_process_port", str(port)]
        command += ["--deepspeed_multinode_launcher", "standard", str(SCRIPT)]
        command += [str(output), str(4 // nodes), str(hang_after)]
        log = open(output / f"node{node}.log", "a")
        launchers.append(
            subprocess.Popen(command, env=environment, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
        )
    return launchers


def _logs(output: Path) -> str:
    return "\n".join((output / f"node{node}.log").read_text()[-2500:] for node in (0, 1))


def _losses(output: Path) -> dict[int, float]:
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record["train/loss"] for record in records if "train/loss" in record}


def _shards(checkpoint: Path) -> int:
    return len(list(checkpoint.rglob("*optim_states.pt")))


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.timeout(500)
def test_two_nodes_are_killed_and_one_goes_on_as_if_nothing_had_happened(tmp_path):
    """Tolerance against one process at the same global batch: 1e-4, fp32."""
    launchers = _launch(2, tmp_path, hang_after=3)
    try:
        deadline = time.monotonic() + 240
        while not (tmp_path / "hangs").exists():
            assert time.monotonic() < deadline and all(p.poll() is None for p in launchers), _logs(tmp_path)
            time.sleep(0.2)
    finally:
        for process in launchers:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert max(_losses(tmp_path)) == 3
    checkpoints = tmp_path / "checkpoints" / "photon"
    before = (checkpoints / "step_000002" / "manifest.json").read_text()
    assert _shards(checkpoints / "step_000002") == 4, "every process of both nodes has written its shard"
    (last,) = _launch(1, tmp_path, hang_after=0)
    assert last.wait(timeout=240) == 0, _logs(tmp_path)
    assert (checkpoints / "step_000002" / "manifest.json").read_text() == before
    assert _shards(checkpoints / "step_000004") == 2
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step_000002", "step_000004"]

    spec = importlib.util.spec_from_file_location("run_node", SCRIPT)
    one = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(one)
    one.main(tmp_path / "one", batch_size=8, hang_after=0)
    expected = _losses(tmp_path / "one")
    assert _losses(tmp_path) == pytest.approx(expected, rel=1e-4) and len(expected) == 4


def test_the_slurm_script_starts_a_launcher_per_node(tmp_path):
    """With stand-ins for Slurm's commands, whose arguments are looked at."""
    stubs = {
        "scontrol": "echo node-a; echo node-b",
        "srun": 'shift; for SLURM_NODEID in 0 1; do export SLURM_NODEID; "$@"; done',
        "accelerate": 'echo "$@"',
    }
    for name, body in stubs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    environment |= {"SLURM_JOB_NODELIST": "node-[a-b]", "SLURM_JOB_ID": "123456", "SLURM_NNODES": "2"}
    command = [str(ROOT / "accelerate_configs" / "slurm.sh"), "--model", "a b", "--output", "/shared/out"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    for node, line in enumerate(done.stdout.splitlines()):
        assert f"--num_machines 2 --num_processes 16 --machine_rank {node} --main_process_ip node-a" in line
        assert line.endswith("recipes/convert_llama.py --resume --model a b --output /shared/out")
    assert node == 1

    from accelerate.commands.launch import launch_command_parser

    arguments = launch_command_parser().parse_args(line.split()[1:])
    assert arguments.main_process_port == 23456 and arguments.machine_rank == 1
