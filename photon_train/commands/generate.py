"""Write text with an exported PHOTON model.

photon-train generate --model runs/demo/export --prompt "def main" --backend torch|triton
"""

from __future__ import annotations

import argparse
import time

from photon_train.cli import main_wrapper
from photon_train.commands import GENERATION_CONFIG_HELP, place
from photon_train.errors import PhotonError


def make_parser(prog: str = "photon-train generate") -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", required=True, type=place, help="directory of an exported checkpoint")
    parser.add_argument("--prompt", required=True, nargs="+", help="one or more prompts, continued as one batch")
    parser.add_argument("--backend", default="torch", help="torch, or triton (a GPU, or TRITON_INTERPRET=1 on the CPU)")
    parser.add_argument("--protocol", help="presets split and paper: hiergen (default), or the paper's recgen")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="new tokens per prompt")
    parser.add_argument("--temperature", type=float, help="sampling temperature; 0 (or none anywhere) is greedy")
    parser.add_argument("--top-p", type=float, help="nucleus of the sampling; none anywhere: all")
    parser.add_argument("--generation-config", default="auto", help=GENERATION_CONFIG_HELP)
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling")
    parser.add_argument("--device", default=None, help="cpu, cuda, ...; default: a GPU if there is one")
    parser.add_argument("--dtype", default="auto", help="auto (the checkpoint's), float32, bfloat16 or float16")
    return parser


def main(argv: list[str] | None = None, prog: str = "photon-train generate") -> None:
    """Run the command.

    Args:
        argv: Arguments without the program's name; None takes `sys.argv`.
        prog: Program name that ``--help`` shows.

    Raises:
        PhotonError: for bad input.
    """
    options = make_parser(prog).parse_args(argv)
    from transformers import set_seed

    from photon_train.inference.defaults import check_mode, sampling_defaults, without_sampling
    from photon_train.inference.request import SamplingParams
    from photon_train.inference.text import generate_settings, generate_text, load_for_inference

    given = {"temperature": options.temperature, "top_p": options.top_p}
    given = {name: value for name, value in given.items() if value is not None}
    SamplingParams(options.max_new_tokens, **given)  # what is wrong is said before the model is loaded
    check_mode(options.generation_config)
    if not 0 <= options.seed < 2**32:
        raise PhotonError(f"--seed {options.seed} is not between 0 and 2^32 - 1")
    model, tokenizer = load_for_inference(options.model, options.backend, options.device, options.dtype)
    if options.protocol is not None:
        if not hasattr(model, "set_protocol"):
            raise PhotonError("--protocol is for models of presets split and paper: leave it out")
        try:
            model.set_protocol(options.protocol)
        except ValueError as error:
            raise PhotonError(f"--protocol: {error}") from error
    set_seed(options.seed)
    defaults = sampling_defaults(model.generation_config, options.generation_config)
    params = SamplingParams(options.max_new_tokens, **{**defaults, **given})
    model.generation_config = without_sampling(model.generation_config)
    began = time.perf_counter()
    texts = generate_text(model, tokenizer, options.prompt, **generate_settings(params))
    for prompt, text in zip(options.prompt, texts, strict=True):
        print(f"--- {prompt}\n{text}")
    seconds = time.perf_counter() - began
    print(f"--- {len(texts)} x up to {options.max_new_tokens} tokens in {seconds:.1f} s ({options.backend})")


if __name__ == "__main__":
    main_wrapper(main)
