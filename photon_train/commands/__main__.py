"""`photon-train COMMAND ...`: find the command and hand its arguments over."""

from __future__ import annotations

import difflib
import importlib
import sys
from typing import NoReturn

from photon_train import __version__
from photon_train.cli import main_wrapper
from photon_train.errors import PhotonError

# Each is a module beside this one, imported when it is asked for.
COMMANDS = {
    "convert": "dense model -> PHOTON -> LoRA fine-tuning -> export; without --model: a demo",
    "convert-qwen": "the same with defaults that suit Qwen2 and Qwen3",
    "finetune": "fine-tune a converted or exported PHOTON model further",
    "generate": "write text with an exported PHOTON model",
    "serve": "serve an exported PHOTON model over HTTP with OpenAI's interface",
    "evaluate": "score models, dense or PHOTON, on tasks of lm-evaluation-harness",
}

_USAGE = """\
usage: photon-train COMMAND ... | --help | --version

{commands}

photon-train COMMAND --help explains a command. It runs in one process; several train together, after
`accelerate config` or with its --config_file, by
  accelerate launch -m photon_train.commands.convert ...    (or convert_qwen, finetune)"""


def usage() -> str:
    """What `photon-train --help` prints."""
    width = max(map(len, COMMANDS))
    listed = "\n".join(f"  {name:{width}}  {what}" for name, what in COMMANDS.items())
    return _USAGE.format(commands=listed)


def run(argv: list[str]) -> None:
    """Carry out a command line, the program's name left out.

    Raises:
        PhotonError: if there is no such command, or from the command itself.
    """
    if not argv or argv[0] in ("--help", "-h"):
        print(usage())
        return
    name, *arguments = argv
    if name == "--version":
        print(f"photon-train {__version__}")
        return
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"the commands are {', '.join(COMMANDS)}"
        raise PhotonError(f"unknown command {name!r}: {hint} (see photon-train --help)")
    importlib.import_module(f"photon_train.commands.{name.replace('-', '_')}").main(arguments)


def main() -> NoReturn:
    """The console script `photon-train`."""
    main_wrapper(lambda: run(sys.argv[1:]))


if __name__ == "__main__":
    main()
