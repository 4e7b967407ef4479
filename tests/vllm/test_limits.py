"""What an export takes of vLLM's cache, LoRA beside it, several ranks, and what is refused."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_dense import SPECIALS
from tiny_vllm import check, expected, export, generate, prompts
from vllm import SamplingParams
from vllm.lora.request import LoRARequest

import photon_vllm
from photon_train import accounting
from photon_vllm.specs import SinkWindowSpec

SUPPORT = Path(__file__).resolve().parents[1] / "support"


@pytest.mark.parametrize("bits", [16, 4])
def test_a_request_keeps_what_accounting_says(bits: int, tmp_path: Path, serve: Callable) -> None:
    """Blocks of windows do not grow, those of the memory as the formula says; the rest is a block's rounding."""
    model = export(tmp_path, memory_bits=bits, memory_cells={0: [1], 1: [0], 2: [0, 1], 3: [0]})
    config = model.config
    llm = serve(tmp_path, max_num_batched_tokens=64, enable_prefix_caching=False)
    engine = llm.llm_engine
    scheduler = engine.engine_core.engine_core.scheduler
    managers = scheduler.kv_cache_manager.coordinator.single_type_managers
    groups = scheduler.kv_cache_config.kv_cache_groups
    caches = engine.vllm_config.compilation_config.static_forward_context
    sampling = SamplingParams(temperature=0, max_tokens=250, detokenize=False, ignore_eos=True)
    engine.add_request("long", {"prompt_token_ids": prompts((200,))[0]}, sampling)
    seen = 0
    while engine.has_unfinished_requests():
        engine.step()
        request = next(iter(scheduler.requests.values()), None)
        if request is None or request.num_computed_tokens < 200 or request.num_computed_tokens % 50:
            continue
        seen, length, windows = seen + 1, request.num_computed_tokens, 0
        for manager, group in zip(managers, groups, strict=True):
            blocks = sum(not block.is_null for block in manager.req_to_blocks[request.request_id])
            pages = [caches[name].get_kv_cache_spec(engine.vllm_config) for name in group.layer_names]
            size, held = pages[0].block_size, blocks * sum(page.page_size_bytes for page in pages)
            if isinstance(pages[0], SinkWindowSpec):
                windows += held
            else:
                assert blocks - math.ceil(length / size) in (0, 1)  # room for the next token
                assert held == blocks * size * accounting.growing_bytes_per_token(config, 4)
        # A window and the sinks begin and end within blocks.
        constant = accounting.cache_bytes(config, length, 4).constant
        rounding = 3 * 16 * 2 * config.num_key_value_heads * config.head_dim * 4 * config.num_hidden_layers
        assert abs(windows - constant) <= rounding < constant * 2
    assert seen >= 4


def test_lora_beside_the_attention(tmp_path: Path, serve: Callable) -> None:
    """An adapter for the family's linear layers, chosen request by request, gives what merged weights give."""
    model = export(tmp_path / "export")
    adapter, generator, weights = tmp_path / "adapter", torch.Generator().manual_seed(1), {}
    adapter.mkdir()
    for layer, name in ((layer, name) for layer in range(4) for name in ("q_proj", "k_proj", "o_proj")):
        linear = getattr(model.model.layers[layer].self_attn, name)
        down, up = (
            torch.randn(8, linear.in_features, generator=generator),
            torch.randn(linear.out_features, 8, generator=generator),
        )
        prefix = f"base_model.model.model.layers.{layer}.self_attn.{name}"
        weights |= {f"{prefix}.lora_A.weight": down * 0.1, f"{prefix}.lora_B.weight": up * 0.1}
    save_file(weights, adapter / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": ["q_proj", "k_proj", "o_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    llm = serve(tmp_path / "export", enable_lora=True, max_lora_rank=8)
    given = prompts((7, 75))
    check(model, given, generate(llm, given))
    for name, down in list(weights.items())[::2]:
        linear = model.get_submodule(name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
        with torch.no_grad():
            linear.weight += weights[name.replace("lora_A", "lora_B")] @ down
    sampling = SamplingParams(temperature=0, max_tokens=24, logprobs=1, detokenize=False, ignore_eos=True)
    request = LoRARequest("adapter", 1, str(adapter))
    found = llm.generate([{"prompt_token_ids": prompt} for prompt in given], sampling, lora_request=request)
    check(model, given, found)


GPT_OSS = {
    "hidden_size": 128,
    "intermediate_size": 128,  # of which vLLM's experts on a CPU take a half, and no less
    "layer_types": ["sliding_attention", *["full_attention"] * 3],
    "memory_cells": {1: [0], 2: [1], 3: [0, 1]},
    "rope_parameters": {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 16, "rope_theta": 1e4},
}
PARALLEL = """
import json, sys
from tiny_vllm import generate
from vllm import LLM
if __name__ == "__main__":
    directory, given = sys.argv[1], json.loads(sys.argv[2])
    llm = LLM(directory, skip_tokenizer_init=True, dtype="float32", max_model_len=512, enforce_eager=True,
              tensor_parallel_size=2, max_num_batched_tokens=48, max_num_seqs=8)
    for _ in range(2):
        found = generate(llm, given)
    print(json.dumps([[list(one.outputs[0].token_ids) for one in found], [one.num_cached_tokens for one in found]]))
"""


@pytest.mark.distributed
@pytest.mark.timeout(900)  # two processes wait for each other in turns where other work has the processors
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"num_key_value_heads": 1, "memory_cells": {1: [0]}}),
        ("gpt_oss", {**SPECIALS["gpt_oss"], **GPT_OSS}),
    ],
)
def test_two_ranks(family: str, changes: dict, tmp_path: Path) -> None:
    """One head that both ranks have; cells of one rank alone, of the other, of both, and each rank's sink logits."""
    model = export(tmp_path, family, memory_bits=4, **changes)
    given = prompts()
    (tmp_path / "serve.py").write_text(PARALLEL)
    environment = {**os.environ, "PYTHONPATH": f"{SUPPORT}:{os.environ.get('PYTHONPATH', '')}"}
    environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING")
    command = [sys.executable, str(tmp_path / "serve.py"), str(tmp_path), json.dumps(given)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr[-3000:]
    # vLLM's own lines may follow.
    tokens, cached = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("[[")))
    assert tokens == [expected(model, prompt)[0] for prompt in given]
    assert cached[-1] >= 128


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"kv_cache_dtype": "fp8"}, "--kv-cache-dtype: not supported for a PHOTON model"),
        ({"disable_hybrid_kv_cache_manager": True}, "--disable-hybrid-kv-cache-manager: not supported"),
    ],
)
def test_what_does_not_work_is_refused(settings: dict, said: str, tmp_path: Path, serve: Callable, capfd) -> None:
    export(tmp_path)
    with pytest.raises(Exception, match=".") as error:
        serve(tmp_path, **settings)
    assert said in str(error.value) + capfd.readouterr().err


def test_another_release_is_refused() -> None:
    photon_vllm.check_version("0.32.0+cpu")
    with pytest.raises(RuntimeError, match="tested with vLLM 0.32.0, and 0.33.1 is installed"):
        photon_vllm.check_version("0.33.1")


def test_nothing_of_vllm_is_imported_before_it_asks() -> None:
    code = "import sys, photon_vllm; assert not any(name.split('.')[0] == 'vllm' for name in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
