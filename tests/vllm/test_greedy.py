"""vLLM writes what `generate()` writes: for every family and kind of memory, in mixed batches, from cached prefixes."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_dense import SPECIALS
from tiny_vllm import check, export, generate, metric, prompts
from vllm import SamplingParams

from photon_train.models.families_photon import CLASS_PREFIXES, LLAMA_LIKE
from photon_vllm import FAMILIES, REFUSED

# Kinds of memory and of layers.
KINDS: dict[str, dict[str, Any]] = {
    "latents": {},
    "8-bits": {"memory_bits": 8},
    "4-bits-apart": {"memory_bits": 4, "latents_per_unit": 2},
    "unpacked": {"chunk_size": 1, "memory_bits": 4},
    "by-four": {"chunk_size": 4, "window": 30},
    "no-memory": {"memory_cells": {}},
    "no-sinks": {"num_sinks": 0},
    "many-sinks": {"num_sinks": 21},
    "full-layer": {"full_attention_layers": [1]},
    "same-heads": {"num_key_value_heads": 4, "memory_cells": {1: [0, 3], 3: [2]}},
}
OTHERS = [name for name in FAMILIES if name not in LLAMA_LIKE]
# As Qwen2, below.
# vLLM has angles for so many positions as YaRN makes of the original ones.
_YARN = {"factor": 32.0}
WIDE = {
    "granitemoe": {"hidden_size": 128},
    "olmoe": {"hidden_size": 128, "clip_qkv": None},
    "lfm2": {"hidden_size": 128},
    "gpt_oss": {"rope_parameters": {**SPECIALS["gpt_oss"]["rope_parameters"], **_YARN}},
    # As published: queries and keys without YaRN's factor.
    "ministral3": {
        "rope_parameters": {**SPECIALS["ministral3"]["rope_parameters"], **_YARN, "mscale": 1.0, "mscale_all_dim": 1.0}
    },
}
LOCAL = {"sliding_window": 40, "layer_types": ["full_attention", "sliding_attention"] * 2}
CASES = {
    **{f"llama-{kind}": ("llama", changes) for kind, changes in KINDS.items()},
    # vLLM's Qwen2 takes the size of heads from that of the model.
    **{family: (family, {"memory_bits": 4, "hidden_size": 128}) for family in LLAMA_LIKE if family != "llama"},
    **{
        family: (family, {**SPECIALS.get(family, {}), "memory_cells": {1: [1], 3: [0, 1]}, **WIDE.get(family, {})})
        for family in OTHERS
    },
    "llama-local-layers": ("llama", {**LOCAL, "memory_cells": {0: [1], 2: [0, 1]}}),
}


@pytest.mark.parametrize("case", CASES)
def test_greedy_tokens_are_those_of_transformers(case: str, tmp_path: Path, serve: Callable) -> None:
    family, changes = CASES[case]
    model = export(tmp_path, family, **changes)
    # Long prompts are cut, and share steps with requests that decode.
    llm = serve(tmp_path, max_num_batched_tokens=48, max_num_seqs=8)
    given = prompts()
    check(model, given, generate(llm, given))
    again = generate(llm, given)
    check(model, given, again)
    # Blocks of the memory cover more tokens than those of a window.
    assert [output.num_cached_tokens for output in again][-1] >= 128
    # Another text after the same beginning.
    forked = [given[-1][:160] + list(range(20)), given[-1][:160] + list(range(50, 60))]
    found = generate(llm, forked)
    check(model, forked, found)
    # By default vLLM keeps windows at the ends of prompts and where prompts are seen to part, and states at the ends.
    if not model.config.recurrent_layers:
        assert found[-1].num_cached_tokens >= (128 if model.config.memory_cells else 16)
    else:
        groups = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_config.kv_cache_groups
        states = [group.kv_cache_spec.page_size_bytes for group in groups if "conv" in group.layer_names[0]]
        assert set(states) == {model.config.hidden_size * (model.config.conv_L_cache - 1) * 4}
    assert llm.reset_prefix_cache()
    check(model, given[-1:], generate(llm, given[-1:]))


@pytest.mark.parametrize("family", REFUSED)
def test_other_families_are_refused(family: str, tmp_path: Path, serve: Callable, capfd) -> None:
    assert set(CLASS_PREFIXES) == {*FAMILIES, *REFUSED}
    export(tmp_path, family, **SPECIALS.get(family, {}), memory_cells={1: [1], 3: [0, 1]})
    with pytest.raises(Exception, match=".") as error:
        serve(tmp_path)
    assert f"exports of family {family} are not served on vLLM" in str(error.value) + capfd.readouterr().err


@pytest.mark.parametrize(
    ("family", "changes", "said"),
    [
        ("olmoe", {"clip_qkv": 8.0}, "does not read clip_qkv=8.0"),
        ("gpt_oss", {"rms_norm_eps": 1e-6}, "does not read rms_norm_eps=1e-06"),
        (
            "gpt_oss",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
            "rope_type=default of config.json",
        ),
        ("ministral3", SPECIALS["ministral3"], "rotates 64 positions"),
    ],
)
def test_what_vllm_leaves_out_is_refused(
    family: str, changes: dict, said: str, tmp_path: Path, serve: Callable, capfd
) -> None:
    export(tmp_path, family, **{**SPECIALS[family], **WIDE[family], **changes, "memory_cells": {1: [1]}})
    with pytest.raises(Exception, match=".") as error:
        serve(tmp_path)
    text = str(error.value) + capfd.readouterr().err
    assert said in text and f"of family {family}" in text


def test_a_prefix_that_is_computed_in_the_same_step(tmp_path: Path, serve: Callable) -> None:
    """Two requests arrive at once: the second takes the first's blocks before they are computed."""
    model = export(tmp_path, memory_bits=4)
    llm = serve(tmp_path, max_num_batched_tokens=512)
    given = [prompts()[-1], prompts()[-1], prompts()[-1][:193]]
    found = generate(llm, given)
    assert [output.num_cached_tokens for output in found][1:] == [192, 192]
    check(model, given, found)


def test_preempted_requests_go_on(tmp_path: Path, serve: Callable) -> None:
    model = export(tmp_path, memory_bits=4)
    llm = serve(tmp_path, max_num_seqs=8, max_num_batched_tokens=64)
    given, count = prompts((20, 60, 100)), 40
    sampling = SamplingParams(temperature=0, max_tokens=count, logprobs=1, detokenize=False, ignore_eos=True)
    engine, found = llm.llm_engine, {}
    for number, prompt in enumerate(given):
        engine.add_request(str(number), {"prompt_token_ids": prompt}, sampling)
    for step in itertools.count():
        if step in (9, 20):
            # Everything that runs is preempted, and nothing of it stays in the prefix cache.
            assert engine.engine_core.reset_prefix_cache(reset_running_requests=True)
        found.update({output.request_id: output for output in engine.step() if output.finished})
        if not engine.has_unfinished_requests():
            break
    assert metric(llm, "num_preemptions") >= 2 * len(given)
    check(model, given, [found[str(number)] for number in range(len(given))], count)


def test_compiled(tmp_path: Path, serve: Callable) -> None:
    """Attention is one operation of the graph that vLLM compiles."""
    model = export(tmp_path, memory_bits=4)
    llm = serve(tmp_path, enforce_eager=False, max_num_batched_tokens=48)
    given = prompts()
    check(model, given, generate(llm, given))
