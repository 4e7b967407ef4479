"""vLLM's load generator, imported once for many loads; runs in vLLM's environment.

Every line on stdin is a JSON list, the options of one `vllm bench serve`. For each a line on stdout begins with
`FOUND` and holds the figures as JSON; what vLLM prints goes to stderr.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys

FOUND = "FOUND "


def main() -> None:
    from vllm.benchmarks.serve import add_cli_args
    from vllm.benchmarks.serve import main as load
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser: argparse.ArgumentParser = FlexibleArgumentParser()
    add_cli_args(parser)
    for line in sys.stdin:
        with contextlib.redirect_stdout(sys.stderr):
            figures = load(parser.parse_args(json.loads(line)))
        print(FOUND + json.dumps(figures, default=str), flush=True)


if __name__ == "__main__":
    main()
