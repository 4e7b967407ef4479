"""Sampling settings that a checkpoint's generation_config.json gives where the user gives none: one rule for all."""

from __future__ import annotations

import logging
from typing import Any

from transformers import GenerationConfig

from photon_train.errors import PhotonError
from photon_train.inference.request import SamplingParams

logger = logging.getLogger(__name__)

MODES = ("auto", "ignore")
_SAMPLING = ("temperature", "top_k", "top_p", "min_p")
# What changes the tokens and is not done here, with the values that change nothing.
_UNKNOWN: dict[str, tuple[Any, ...]] = {
    "bad_words_ids": ([],),
    "begin_suppress_tokens": ([],),
    "diversity_penalty": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "exponential_decay_length_penalty": (),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "guidance_scale": (1,),
    "max_time": (),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "no_repeat_ngram_size": (0,),
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "penalty_alpha": (0,),
    "sequence_bias": ([], {}),
    "suppress_tokens": ([],),
    "top_h": (),
    "typical_p": (1,),
    "watermarking_config": (),
}


def check_mode(mode: str) -> None:
    """Check a mode of `sampling_defaults`.

    Raises:
        PhotonError: for one that there is not.
    """
    if mode not in MODES:
        raise PhotonError(f"generation_config={mode!r} is not auto or ignore")


def sampling_defaults(config: GenerationConfig, mode: str = "auto", with_text: bool = True) -> dict[str, Any]:
    """Settings of `SamplingParams` that a generation config gives; what else it asks for is said in a warning.

    Temperature, top_k, top_p and min_p count unless it says ``do_sample: false``. Lengths do not: whoever generates
    bounds them.

    Args:
        config: The model's.
        mode: `auto`, or `ignore` for none of it.
        with_text: Whether there is a tokenizer, which stop texts need.

    Raises:
        PhotonError: for another mode, or a value out of range.
    """
    check_mode(mode)
    if mode == "ignore":
        return {}
    names = ("repetition_penalty", *(() if config.do_sample is False else _SAMPLING))
    found = {name: getattr(config, name) for name in names if getattr(config, name, None) is not None}
    if config.do_sample:
        found.setdefault("temperature", 1.0)
    stop = [config.stop_strings] if isinstance(config.stop_strings, str) else config.stop_strings or []
    if stop and with_text:
        found["stop"] = tuple(stop)
    neutral = vars(SamplingParams())
    try:
        SamplingParams(**found)
    except (PhotonError, TypeError) as error:
        raise PhotonError(f"generation_config.json: {error}: correct it, or ignore it (generation_config)") from error
    found = {name: value for name, value in found.items() if value != neutral[name]}
    if found:
        logger.warning("generation_config.json gives %s where nothing else is asked for", _written(found))
    missing = {name: getattr(config, name, None) for name in _UNKNOWN}
    missing = {name: value for name, value in missing.items() if value not in (None, *_UNKNOWN[name])}
    if stop and not with_text:
        missing["stop_strings"] = stop
    if missing:
        logger.warning("generation_config.json asks for %s, which is not done here", _written(missing))
    return found


def without_sampling(config: GenerationConfig) -> GenerationConfig:
    """The same tokens that begin, end and fill a text, and no other setting."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return GenerationConfig(**{name: getattr(config, name) for name in names})


def _written(values: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in values.items())
