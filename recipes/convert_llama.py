"""Dense Llama (or Mistral, Qwen2, Qwen3, Phi-3) -> PHOTON -> LoRA fine-tuning -> export: the main command.

accelerate launch recipes/convert_llama.py --model DIR|HUB_ID --data PATH|HUB_ID --output DIR

Without --model it runs the demo of `configs/demo.yaml` on a small dense Llama that it pretrains itself.
"""

from __future__ import annotations

import sys
from pathlib import Path

from photon_train.cli import load_config, main_wrapper
from photon_train.config import RunConfig

DEMO = Path(__file__).resolve().parent / "configs" / "demo.yaml"
SETTINGS = {
    "prog": "accelerate launch recipes/convert_llama.py",
    "description": "Convert a dense language model to PHOTON, fine-tune it with LoRA and export it. "
    f"Without --model: the demo, whose defaults are in recipes/configs/{DEMO.name}.",
}


def read_settings(arguments: list[str]) -> RunConfig:
    """The run's settings; without a model the demo's take the place of the defaults."""
    config = load_config(arguments, **SETTINGS)
    if config.model is None:
        config = load_config(arguments, defaults=load_config(["--config", str(DEMO)], **SETTINGS), **SETTINGS)
    return config


def main() -> None:
    config = read_settings(sys.argv[1:])
    # Imported after the settings are read: --help and a mistyped key answer at once.
    from photon_train.pipeline import run_conversion

    run_conversion(config)


if __name__ == "__main__":
    main_wrapper(main)
