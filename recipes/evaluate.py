"""Score models on tasks of lm-evaluation-harness, side by side: the dense model and its PHOTON, or any others.

python recipes/evaluate.py --model meta-llama/Llama-3.2-1B runs/llama-1b/export --tasks hellaswag arc_easy

`photon-train evaluate` is the same.
"""

from __future__ import annotations

from functools import partial

from photon_train.cli import main_wrapper
from photon_train.commands import evaluate

main = partial(evaluate.main, prog="python recipes/evaluate.py")

if __name__ == "__main__":
    main_wrapper(main)
