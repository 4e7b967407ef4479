"""Kill tiny runs at random moments and run them to their end; started by test_killed_runs.py in a process of its own.

Usage: killed_runs.py <output> <kills> <seed>

Every training is a forked child, so that the imports are paid once. Half of the kills come after a random time, half
at a random change of the file system (a file opened for writing, a rename, a removal), which is where a run that does
not take care loses something. `<output>/report.json` tells what happened; the runs lie in `<output>/<number>` and the
one that nobody killed in `<output>/straight`.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from tiny_training import tiny_data, tiny_model, tiny_run

from photon_train.training.checkpoint import checkpoint_dir
from photon_train.training.loop import train
from photon_train.training.lora import add_lora

CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree"}
STEPS = 8


def training(output: Path) -> None:
    """The command that is killed and started again: dropout, accumulation, evaluations, a checkpoint every step."""
    config = tiny_run(
        {"dropout": 0.2},
        max_steps=STEPS,
        batch_size=2,
        gradient_accumulation_steps=2,
        eval_every=4,
        eval_sequences=2,
        save_every=1,
    )
    config.resume = True
    model = add_lora(tiny_model("llama"), config.lora, config.seed)
    train(model, tiny_data(14, seed=1), tiny_data(3, seed=2), config, output)


def kill_at_change(number: int, beginning: str) -> None:
    """Let this process kill itself at the `number`-th change of a file whose path begins like this."""
    left = [number]

    def hook(event: str, arguments: tuple) -> None:
        is_write = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if (event in CHANGES or is_write) and str(arguments[0]).startswith(beginning):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def start(output: Path, change: tuple[int, str] | None = None) -> int:
    """Fork a training that kills itself at `change` (see `kill_at_change`), if given; returns its process id."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        log = os.open(output.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        if change is not None:
            kill_at_change(*change)
        training(output)
        status = 0
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
    finally:
        os._exit(status)


def ends_well(child: int) -> bool:
    """Wait for a child; whether it finished (and was not killed)."""
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return False
    assert os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0, f"a run failed by itself: {status}"
    return True


def main(output: Path, kills: int, seed: int) -> None:
    draw = random.Random(seed)
    began = time.perf_counter()
    assert ends_well(start(output / "straight"))
    seconds = time.perf_counter() - began
    done = half_written = number = 0
    while done < kills:
        run = output / str(number)
        if done % 2:
            child = start(run)
            time.sleep(draw.uniform(0, seconds))
            os.kill(child, signal.SIGKILL)
        elif done % 4:  # in the middle of a checkpoint, which has a hidden name until it is complete
            child = start(run, (draw.randrange(2, 12), f"{checkpoint_dir(run, 'photon')}/."))
        else:
            child = start(run, (draw.randrange(1, 60), str(run)))
        if ends_well(child):
            number += 1
            continue
        done += 1
        half_written += any(checkpoint_dir(run, "photon").glob(".*"))
    if (output / str(number)).exists():
        assert ends_well(start(output / str(number)))
        number += 1
    report = {"kills": done, "runs": number, "half_written": half_written, "seconds_of_one": seconds}
    (output / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
