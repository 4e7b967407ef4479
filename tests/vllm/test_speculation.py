"""Drafts from the prompt: what is rejected is taken back from windows and latents.

In a file that comes last: speculation loads a package that this vLLM stumbles over when it starts again in the process.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_vllm import check, export, generate, metric, prompts

from photon_train.models import PhotonConfig
from photon_vllm.model import check as refuse


def test_drafts_from_the_prompt_are_taken_back(tmp_path: Path, serve: Callable) -> None:
    model = export(tmp_path, memory_bits=4)
    drafts = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    llm = serve(tmp_path, speculative_config=drafts, max_num_batched_tokens=48)
    given = [prompt * 3 for prompt in prompts((9, 40))] + prompts()
    check(model, given, generate(llm, given, 60), 60)
    accepted = metric(llm, "spec_decode_num_accepted_tokens")
    assert 0 < accepted < metric(llm, "spec_decode_num_draft_tokens")
    # Another engine would not start here: the settings of this one, with a hybrid's configuration.
    settings = copy.copy(llm.llm_engine.vllm_config)
    settings.model_config = copy.copy(settings.model_config)
    settings.model_config.hf_config = PhotonConfig("lfm2", layer_types=["conv", "full_attention"], num_hidden_layers=2)
    with pytest.raises(ValueError, match="recurrent layers of family lfm2 take no drafts back"):
        refuse(settings)
