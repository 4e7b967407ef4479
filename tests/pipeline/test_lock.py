"""One run at a time in an output directory, and no obstacle of one that is gone."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

import pytest

from photon_train.config import RunConfig
from photon_train.errors import PhotonError
from photon_train.pipeline.lock import FILE_NAME, OutputLock, _process
from photon_train.pipeline.stages import Stages


@pytest.fixture
def other():
    """The id of a process that runs as long as the test."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield process.pid
        process.communicate()


def locked(directory, **changes) -> None:
    """Write the lock that another process would."""
    directory.mkdir(exist_ok=True)
    lock = OutputLock(directory)
    (directory / FILE_NAME).write_text(json.dumps({**lock._own, **changes}))


def started(pid: int) -> int:
    return _process(pid)[1]


def gone() -> int:
    """The id of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def config(directory, resume: bool = True) -> RunConfig:
    return RunConfig(output=str(directory), resume=resume)


@pytest.mark.parametrize("resume", [True, False])
def test_the_second_run_is_refused_and_leaves_the_first_its_files(tmp_path, other, resume):
    locked(tmp_path, pid=other, started=started(other))
    half = tmp_path / ".export.0123456789ab"
    half.mkdir()
    with pytest.raises(PhotonError, match=rf"{tmp_path} is being written by another run, process {other} on this"):
        Stages(config(tmp_path, resume), writes=True)
    assert half.is_dir()


def test_a_run_that_began_meanwhile_is_noticed_before_anything_is_written(tmp_path, other):
    stages = Stages(config(tmp_path), writes=True)
    locked(tmp_path, pid=other, started=started(other))
    with pytest.raises(PhotonError, match="another run, process"), stages:
        stages.begin(config(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]


def test_a_run_that_came_and_went_meanwhile_is_noticed(tmp_path):
    stages = Stages(config(tmp_path), writes=True)
    with Stages(config(tmp_path), writes=True) as first:
        first.begin(config(tmp_path))
        first.run("convert", dict)
    before = (tmp_path / "stages.json").read_bytes()
    with pytest.raises(PhotonError, match="another run has written into output"), stages:
        stages.begin(config(tmp_path))
    assert (tmp_path / "stages.json").read_bytes() == before and not (tmp_path / FILE_NAME).exists()


@pytest.mark.parametrize("kind", ["ended", "number passed on", "ended, not waited for"])
def test_the_lock_of_a_process_that_is_gone_is_taken_over(tmp_path, other, kind):
    if kind == "ended":
        locked(tmp_path, pid=gone())
    elif kind == "number passed on":
        locked(tmp_path, pid=other, started=started(other) - 1)
    else:
        zombie = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
        locked(tmp_path, pid=zombie.pid, started=started(zombie.pid))
        zombie.stdin.close()
        os.waitid(os.P_PID, zombie.pid, os.WEXITED | os.WNOWAIT)
    with Stages(config(tmp_path, resume=False), writes=True) as stages:
        stages.begin(config(tmp_path))
        assert json.loads((tmp_path / FILE_NAME).read_text())["pid"] == os.getpid()
        stages.begin(config(tmp_path))  # a run with `dataset.stream` begins twice
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "stages.json"]
    if kind == "ended, not waited for":
        zombie.wait()


def test_the_lock_of_another_machine_is_explained(tmp_path):
    locked(tmp_path, host="node-7", pid=gone())
    with pytest.raises(PhotonError, match=r"on node-7, which cannot be seen from here: .* delete .*\.lock; else"):
        Stages(config(tmp_path), writes=True)
    assert socket.gethostname() != "node-7"


@pytest.mark.parametrize("content", ["", "[]", '{"host": "a"}'])
def test_a_lock_that_is_none_is_named(tmp_path, content):
    (tmp_path / FILE_NAME).write_text(content)
    with pytest.raises(PhotonError, match=r"\.lock cannot be read: delete it"):
        Stages(config(tmp_path), writes=True)


def test_of_several_processes_the_main_one_locks(tmp_path, other):
    locked(tmp_path, pid=other, started=started(other))
    with Stages(config(tmp_path), writes=False) as stages:
        stages.begin(config(tmp_path))
    assert json.loads((tmp_path / FILE_NAME).read_text())["pid"] == other


def test_of_many_that_take_over_a_lock_one_gets_it(tmp_path):
    for _ in range(5):
        locked(tmp_path, pid=gone())
        (results, write), (gate, opened) = os.pipe(), os.pipe()
        children = []
        for _ in range(6):
            children.append(os.fork())
            if not children[-1]:
                try:
                    OutputLock(tmp_path).acquire()
                    os.write(write, b"y")
                except PhotonError:
                    os.write(write, b"n")
                os.close(opened)
                os.read(gate, 1)  # the one that got it lives until all have tried
                os._exit(0)
        found = b"".join(os.read(results, 1) for _ in children)
        os.close(opened)
        for child in children:
            os.waitpid(child, 0)
        assert sorted(found) == sorted(b"ynnnnn")
        assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]


def test_a_lock_that_was_taken_over_meanwhile_is_not_deleted(tmp_path, other, monkeypatch):
    locked(tmp_path, pid=gone())
    lock = OutputLock(tmp_path)
    look = lock._look

    def late():
        found = look()
        locked(tmp_path, pid=other, started=started(other))
        return found

    monkeypatch.setattr(lock, "_look", late)
    with pytest.raises(PhotonError, match=f"another run, process {other}"):
        lock.acquire()
    assert json.loads((tmp_path / FILE_NAME).read_text())["pid"] == other


def test_a_file_system_without_links_will_do(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    lock = OutputLock(tmp_path)
    lock.acquire()
    assert json.loads((tmp_path / FILE_NAME).read_text())["pid"] == os.getpid()
    lock.release()
    assert not list(tmp_path.iterdir())
