"""Dense Qwen2 or Qwen3 -> PHOTON -> LoRA fine-tuning -> export, with defaults that suit the Qwen families.

accelerate launch recipes/convert_qwen.py --model Qwen/Qwen3-0.6B --data PATH|HUB_ID --output DIR

`photon-train convert-qwen` is the same.
"""

from __future__ import annotations

from functools import partial

from photon_train.cli import main_wrapper
from photon_train.commands import convert_qwen

main = partial(convert_qwen.main, prog="accelerate launch recipes/convert_qwen.py")

if __name__ == "__main__":
    main_wrapper(main)
