"""Dense Llama (or Mistral, Qwen2, Qwen3, Phi-3) -> PHOTON -> LoRA fine-tuning -> export: the main command.

accelerate launch recipes/convert_llama.py --model DIR|HUB_ID --data PATH|HUB_ID --output DIR

Without --model it runs a demo on a small dense Llama that it pretrains itself. `photon-train convert` is the same.
"""

from __future__ import annotations

from functools import partial

from photon_train.cli import main_wrapper
from photon_train.commands import convert

main = partial(convert.main, prog="accelerate launch recipes/convert_llama.py")

if __name__ == "__main__":
    main_wrapper(main)
