"""Dense Llama (or Mistral, Qwen2, Qwen3, Phi-3) -> PHOTON -> LoRA fine-tuning -> export: the main command.

photon-train convert --model DIR|HUB_ID --data PATH|HUB_ID --output DIR                                 # one process
accelerate launch -m photon_train.commands.convert --model DIR|HUB_ID --data PATH|HUB_ID --output DIR   # several

Without --model it runs the demo of `demo.yaml` on a small dense Llama that it pretrains itself.
"""

from __future__ import annotations

from pathlib import Path

from photon_train.cli import main_wrapper
from photon_train.commands import requires
from photon_train.config import RunConfig, load_config

DEMO = Path(__file__).with_name("demo.yaml")
DESCRIPTION = (
    "Convert a dense language model to PHOTON, fine-tune it with LoRA and export it. "
    f"Without --model: the demo, whose defaults are in {DEMO}."
)


def read_settings(argv: list[str] | None = None, prog: str = "photon-train convert") -> RunConfig:
    """The run's settings; without a model the demo's take the place of the defaults."""
    names = {"prog": prog, "description": DESCRIPTION}
    config = load_config(argv, **names)
    if config.model is None:
        config = load_config(argv, defaults=load_config(["--config", str(DEMO)], **names), **names)
    return config


def main(argv: list[str] | None = None, prog: str = "photon-train convert") -> None:
    """Run the command; every process of a launcher does.

    Args:
        argv: Arguments without the program's name; None takes `sys.argv`.
        prog: Program name that ``--help`` shows.

    Raises:
        PhotonError: for bad input.
    """
    config = read_settings(argv, prog)
    # Imported after the settings are read: --help and a mistyped key answer at once.
    with requires("train"):
        from photon_train.pipeline import run_conversion

    run_conversion(config)


if __name__ == "__main__":
    main_wrapper(main)
