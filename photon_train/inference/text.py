"""Prompts to text with a PHOTON checkpoint, on the torch or the Triton backend."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria

from photon_train.checkpoints import read_config, read_tokenizer
from photon_train.errors import PhotonError
from photon_train.inference.request import SamplingParams
from photon_train.inference.streaming import TextStream
from photon_train.inference.tokens import prompt_tokens
from photon_train.manifest import FILE_NAME, verify_manifest
from photon_train.models.attention_photon import BACKENDS
from photon_train.models.liger_photon import fuse_layers

logger = logging.getLogger(__name__)


def load_for_inference(
    directory: str | Path, backend: str = "torch", device: str | None = None, dtype: str = "auto"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load an exported (or converted) PHOTON checkpoint and its tokenizer, ready to generate.

    Args:
        directory: What an export wrote; its hashes are checked.
        backend: How cached decoding computes attention and chunkers: `torch` or `triton`.
        device: Default: a GPU if there is one.
        dtype: Type of the weights; `auto` takes the checkpoint's.

    Raises:
        PhotonError: naming what is missing, damaged or cannot run here.
    """
    directory = Path(directory)
    config = read_config(directory)
    if (directory / FILE_NAME).is_file():
        verify_manifest(directory)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(device)
    check_backend(backend, device)
    if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise PhotonError(f"--dtype {dtype!r} is not auto, float32, bfloat16 or float16")
    tokenizer = read_tokenizer(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, config=config, dtype=dtype).to(device).eval()
    model.set_backend(backend)
    fuse_layers(model)
    return model, tokenizer


def check_device(device: str) -> None:
    """Check that torch knows `device`, and has a GPU if it is one.

    Raises:
        PhotonError: if not.
    """
    try:
        is_gpu = torch.device(device).type == "cuda"
    except RuntimeError as error:
        raise PhotonError(f"--device {device!r} is no device of torch: give cpu, cuda, cuda:1, ...") from error
    if is_gpu and not torch.cuda.is_available():
        raise PhotonError(f"--device {device}: torch finds no GPU here: give cpu")


def check_backend(backend: str, device: str) -> None:
    """Check that `backend` can run on `device`.

    Raises:
        PhotonError: for an unknown name, or Triton on a CPU without its interpreter.
    """
    if backend not in BACKENDS:
        raise PhotonError(f"--backend {backend!r} is not one of {', '.join(BACKENDS)}")
    if backend == "triton" and device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise PhotonError(
            "--backend triton needs a GPU: use --backend torch, or set TRITON_INTERPRET=1 to run the kernels "
            "in Triton's (slow) interpreter on the CPU"
        )


def generate_settings(params: SamplingParams) -> dict[str, Any]:
    """Settings of one continuation as `generate_text` takes them."""
    settings: dict[str, Any] = {"max_new_tokens": params.max_new_tokens, "do_sample": not params.greedy}
    settings["repetition_penalty"] = params.repetition_penalty
    settings["stop"] = params.stop
    if not params.greedy:
        # All of them: transformers has defaults of its own, 50 for top_k.
        settings |= {name: getattr(params, name) for name in ("temperature", "top_k", "top_p", "min_p")}
    return settings


class _StopTexts(StoppingCriteria):
    """Ends rows as the engine does (transformers' own `stop_strings` does not take every tokenizer); without beams."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], stop: tuple[str, ...]) -> None:
        self.streams = [TextStream(tokenizer, prompt, stop) for prompt in prompts]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        for stream, token in zip(self.streams, input_ids[:, -1].tolist(), strict=True):
            if not stream.stopped:
                stream.push(token)
        return torch.tensor([stream.stopped for stream in self.streams], device=input_ids.device)


@torch.no_grad()
def generate_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    max_new_tokens: int = 128,
    stop: tuple[str, ...] = (),
    **settings: Any,
) -> list[str]:
    """Continue each prompt; returns the new text alone.

    Args:
        prompts: Texts of any lengths; a batch is padded on the left.
        max_new_tokens: Bound on the new tokens.
        stop: Texts that end a continuation; they are not part of it.
        **settings: Passed to transformers' `generate` (`do_sample`, `temperature`, `num_beams`, ...).

    A text that may grow beyond the model's positions is warned of.

    Raises:
        PhotonError: if a prompt has no token.
    """
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    tokens = [prompt_tokens(tokenizer, prompt) for prompt in prompts]
    if not all(tokens):
        raise PhotonError("a prompt is empty: give at least one token of text")
    most, reach = model.config.max_position_embeddings, max(map(len, tokens)) + max_new_tokens
    if reach > most:
        logger.warning(
            "the longest prompt and %d new tokens reach position %d: the model's positions end at %d",
            max_new_tokens,
            reach,
            most,
        )
    batch = tokenizer.pad({"input_ids": tokens}, return_tensors="pt", return_attention_mask=True).to(model.device)
    if stop:
        settings["stopping_criteria"] = [_StopTexts(tokenizer, batch["input_ids"].tolist(), stop)]
    out = model.generate(**batch, max_new_tokens=max_new_tokens, pad_token_id=tokenizer.pad_token_id, **settings)
    texts = tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text[: min(place for place in (*map(text.find, stop), len(text)) if place >= 0)] for text in texts]
