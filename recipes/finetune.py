"""Fine-tune a PHOTON model, on other data or for longer, and export it again.

accelerate launch recipes/finetune.py --model runs/llama-1b/export --data PATH|HUB_ID --output DIR

`photon-train finetune` is the same.
"""

from __future__ import annotations

from functools import partial

from photon_train.cli import main_wrapper
from photon_train.commands import finetune

main = partial(finetune.main, prog="accelerate launch recipes/finetune.py")

if __name__ == "__main__":
    main_wrapper(main)
