"""Fine-tune a PHOTON model, on other data or for longer, and export it again.

photon-train finetune --model runs/llama-1b/export --data PATH|HUB_ID --output DIR                         # one process
accelerate launch -m photon_train.commands.finetune --model runs/llama-1b/export --data ... --output DIR   # several
"""

from __future__ import annotations

from photon_train.cli import main_wrapper
from photon_train.commands import requires
from photon_train.config import load_config

DESCRIPTION = (
    "Fine-tune a converted or exported PHOTON model with LoRA and export it. The hierarchy is the "
    "model's own: photon.*, preset and train.dense_baseline have no meaning here."
)


def main(argv: list[str] | None = None, prog: str = "photon-train finetune") -> None:
    """Run the command; every process of a launcher does.

    Args:
        argv: Arguments without the program's name; None takes `sys.argv`.
        prog: Program name that ``--help`` shows.

    Raises:
        PhotonError: for bad input.
    """
    config = load_config(argv, prog=prog, description=DESCRIPTION)
    # Imported after the settings are read: --help and a mistyped key answer at once.
    with requires("train"):
        from photon_train.pipeline import run_finetuning

    run_finetuning(config)


if __name__ == "__main__":
    main_wrapper(main)
