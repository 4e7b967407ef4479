"""Dense Qwen2 or Qwen3 -> PHOTON -> LoRA fine-tuning -> export, with defaults that suit the Qwen families.

photon-train convert-qwen --model Qwen/Qwen3-0.6B --data PATH|HUB_ID --output DIR

The defaults are in `qwen.yaml`; everything else is as in `convert`.
"""

from __future__ import annotations

from pathlib import Path

from photon_train.cli import main_wrapper
from photon_train.commands import requires
from photon_train.config import load_config
from photon_train.errors import PhotonError

DEFAULTS = Path(__file__).with_name("qwen.yaml")
FAMILIES = ("qwen2", "qwen3")
DESCRIPTION = (
    f"Convert a dense Qwen2 or Qwen3 to PHOTON, fine-tune it with LoRA and export it. The defaults are in {DEFAULTS}."
)


def main(argv: list[str] | None = None, prog: str = "photon-train convert-qwen") -> None:
    """As `convert.main`.

    Raises:
        PhotonError: for bad input, a model of another family included.
    """
    names = {"prog": prog, "description": DESCRIPTION}
    defaults = load_config(["--config", str(DEFAULTS)], **names)
    config = load_config(argv, defaults=defaults, **names)
    if config.model is None:
        raise PhotonError("model is not set: name a dense Qwen2 or Qwen3 (a directory or a hub id)")
    # Imported after the settings are read: --help and a mistyped key answer at once.
    with requires("train"):
        from photon_train.pipeline import run_conversion

    run_conversion(config, FAMILIES)


if __name__ == "__main__":
    main_wrapper(main)
