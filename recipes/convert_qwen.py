"""Dense Qwen2 or Qwen3 -> PHOTON -> LoRA fine-tuning -> export, with defaults that suit the Qwen families.

accelerate launch recipes/convert_qwen.py --model Qwen/Qwen3-0.6B --data PATH|HUB_ID --output DIR

The defaults are in `configs/qwen.yaml`; everything else is as in `convert_llama.py`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from photon_train.cli import load_config, main_wrapper
from photon_train.errors import PhotonError

DEFAULTS = Path(__file__).resolve().parent / "configs" / "qwen.yaml"
FAMILIES = ("qwen2", "qwen3")
SETTINGS = {
    "prog": "accelerate launch recipes/convert_qwen.py",
    "description": "Convert a dense Qwen2 or Qwen3 to PHOTON, fine-tune it with LoRA and export it. "
    f"The defaults are in recipes/configs/{DEFAULTS.name}.",
}


def main() -> None:
    defaults = load_config(["--config", str(DEFAULTS)], **SETTINGS)
    config = load_config(sys.argv[1:], defaults=defaults, **SETTINGS)
    if config.model is None:
        raise PhotonError("model is not set: name a dense Qwen2 or Qwen3 (a directory or a hub id)")
    # Imported after the settings are read: --help and a mistyped key answer at once.
    from photon_train.pipeline import run_conversion

    run_conversion(config, FAMILIES)


if __name__ == "__main__":
    main_wrapper(main)
