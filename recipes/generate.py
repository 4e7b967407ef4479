"""Write text with an exported PHOTON model.

python recipes/generate.py --model runs/demo/export --prompt "def main" --backend torch|triton

`photon-train generate` is the same.
"""

from __future__ import annotations

from functools import partial

from photon_train.cli import main_wrapper
from photon_train.commands import generate

main = partial(generate.main, prog="python recipes/generate.py")

if __name__ == "__main__":
    main_wrapper(main)
