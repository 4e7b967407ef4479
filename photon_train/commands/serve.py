"""Serve an exported PHOTON model over HTTP with OpenAI's interface.

photon-train serve --model runs/demo/export --port 8000
curl http://127.0.0.1:8000/v1/completions -H 'content-type: application/json' -d '{"prompt": "def main"}'
"""

from __future__ import annotations

import argparse
from pathlib import Path

from photon_train.cli import main_wrapper
from photon_train.commands import GENERATION_CONFIG_HELP, place, requires

GRACE_S = 30


def make_parser(prog: str = "photon-train serve") -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", required=True, type=place, help="directory of an exported checkpoint")
    parser.add_argument("--name", default=None, help="name that clients give; default: the directory's")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--api-key", default=None, help="key that clients must send; default: nobody is asked for one")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on")
    parser.add_argument("--backend", default=None, help="torch or triton; default: triton on a GPU")
    parser.add_argument("--device", default=None, help="cpu, cuda, ...; default: a GPU if there is one")
    parser.add_argument("--dtype", default="auto", help="auto (the checkpoint's), float32, bfloat16 or float16")
    parser.add_argument(
        "--memory", default=None, help="bytes of the cache (4GiB); default: 90%% of a GPU's free memory"
    )
    parser.add_argument("--max-sequences", type=int, default=64, help="sequences that run at a time")
    parser.add_argument("--max-waiting", type=int, default=1024, help="sequences that wait for their turn at most")
    parser.add_argument("--max-length", type=int, default=None, help="longest sequence; default: the model's")
    parser.add_argument("--max-prefixes", type=int, default=8, help="prefixes of prompts that are kept")
    parser.add_argument("--generation-config", default="auto", help=GENERATION_CONFIG_HELP)
    parser.add_argument("--cuda-graphs", default="auto", help="auto or off")
    return parser


def main(argv: list[str] | None = None, prog: str = "photon-train serve") -> None:
    """Run the command.

    Args:
        argv: Arguments without the program's name; None takes `sys.argv`.
        prog: Program name that ``--help`` shows.

    Raises:
        PhotonError: for bad input.
    """
    options = make_parser(prog).parse_args(argv)
    with requires("serve"):
        import uvicorn

        from photon_train.inference.server import create_app
    import torch

    from photon_train.host_memory import keep_freed_memory
    from photon_train.inference.engine import Engine, EngineSettings
    from photon_train.inference.text import load_for_inference

    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    backend = options.backend or ("triton" if device.startswith("cuda") else "torch")
    if device == "cpu":
        keep_freed_memory()
    model, tokenizer = load_for_inference(options.model, backend, device, options.dtype)
    settings = EngineSettings(
        memory=options.memory,
        max_sequences=options.max_sequences,
        max_length=options.max_length,
        max_prefixes=options.max_prefixes,
        cuda_graphs=options.cuda_graphs,
        generation_config=options.generation_config,
    )
    engine, name = Engine(model, tokenizer, settings), options.name or Path(options.model).resolve().name
    app = create_app(engine, name, options.max_waiting, options.api_key)
    # What runs when the server is told to end may finish within this time; the rest is refused.
    uvicorn.run(app, host=options.host, port=options.port, timeout_graceful_shutdown=GRACE_S)


if __name__ == "__main__":
    main_wrapper(main)
