"""Fine-tune a PHOTON model, on other data or for longer, and export it again.

accelerate launch recipes/finetune.py --model runs/llama-1b/export --data PATH|HUB_ID --output DIR
"""

from __future__ import annotations

import sys

from photon_train.cli import load_config, main_wrapper

SETTINGS = {
    "prog": "accelerate launch recipes/finetune.py",
    "description": "Fine-tune a converted or exported PHOTON model with LoRA and export it. The hierarchy is the "
    "model's own: photon.*, preset and train.dense_baseline have no meaning here.",
}


def main() -> None:
    config = load_config(sys.argv[1:], **SETTINGS)
    # Imported after the settings are read: --help and a mistyped key answer at once.
    from photon_train.pipeline import run_finetuning

    run_finetuning(config)


if __name__ == "__main__":
    main_wrapper(main)
