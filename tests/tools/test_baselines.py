"""The caches that PHOTON is measured against compute what they claim."""

from __future__ import annotations

import pytest
import torch
from tiny import base_config, shake, tokens
from transformers import LlamaConfig, LlamaForCausalLM

from lib.baselines import (
    KINDS,
    available,
    cache_bytes,
    encode,
    encode_windowed,
    repeated,
    window_mask,
)
from photon_train import accounting

WINDOW, SINKS = 6, 2


@pytest.fixture
def dense() -> LlamaForCausalLM:
    settings = base_config()
    settings.pop("model_type")
    return shake(LlamaForCausalLM(LlamaConfig(**settings, attn_implementation="sdpa"))).eval()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [3, 20])
@torch.no_grad()
def test_decoding_from_a_repeated_cache_equals_one_pass(dense, kind, length):
    ids = tokens(1, length + 9)
    if not available(kind, dense):
        pytest.skip("this transformers has no fp8 cache")
    mask = window_mask(ids.shape[1], WINDOW, SINKS, ids.device) if kind == "window" else None
    expected = dense(ids, attention_mask=mask).logits[0, length:]
    prompt = ids[:, :length]
    filled = encode_windowed(dense, prompt, WINDOW, SINKS) if kind == "window" else encode(dense, prompt, 4)
    cache = repeated(dense, filled, kind, batch=3, room=9, window=WINDOW, num_sinks=SINKS)
    for step in range(9):
        column = ids[:, length + step : length + step + 1].expand(3, 1)
        logits = dense(column, past_key_values=cache).logits
        # Eight bits with three of mantissa: each key and value is off by up to 1/16.
        tolerance = 0.3 if kind == "fp8" else 2e-4
        torch.testing.assert_close(logits[:, 0], expected[step].expand(3, -1), atol=tolerance, rtol=0)
    held = min(length + 9, WINDOW + SINKS) if kind == "window" else length + 9
    assert cache_bytes(cache) == 3 * accounting.dense_cache_bytes(base_config(), held, 1 if kind == "fp8" else 4)


@pytest.mark.parametrize("kind", ["dynamic", "static", "window"])
def test_generate_goes_on_from_the_cache(dense, kind):
    prompt = tokens(1, 21)
    filled = encode(dense, prompt[:, :-1])
    settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}
    # A window as long as the text changes nothing.
    cache = repeated(dense, filled, kind, batch=2, room=6, window=40, num_sinks=SINKS)
    out = dense.generate(prompt.expand(2, -1), past_key_values=cache, disable_compile=True, **settings)
    assert torch.equal(out, dense.generate(prompt, **settings).expand(2, -1))
