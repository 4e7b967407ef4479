"""Serve an exported PHOTON model over HTTP with OpenAI's interface.

python recipes/serve.py --model runs/demo/export --port 8000

`photon-train serve` is the same.
"""

from __future__ import annotations

from functools import partial

from photon_train.cli import main_wrapper
from photon_train.commands import serve

main = partial(serve.main, prog="python recipes/serve.py")

if __name__ == "__main__":
    main_wrapper(main)
