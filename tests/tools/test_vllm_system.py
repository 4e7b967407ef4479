"""The vLLM baseline against an engine with vLLM's interface: it cannot be installed where these tests run."""

from __future__ import annotations

import importlib.machinery
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from tiny import base_config, shake, tokens
from transformers import LlamaConfig, LlamaForCausalLM

from lib.vllm_system import VllmSystem
from photon_train import accounting
from photon_train.errors import PhotonError

BLOCKS = 10


class Engine:
    """Encodes one waiting prompt per step beside a token of each running request; the first step has no result yet."""

    def __init__(self, model):
        self.model, self.ids, self.made, self.prompts = model, {}, {}, {}
        cache = SimpleNamespace(num_gpu_blocks=BLOCKS, block_size=16)
        self.vllm_config = SimpleNamespace(cache_config=cache)
        self.idle = True

    def add_request(self, name, prompt, params):
        assert name not in self.ids and params.ignore_eos and len(prompt["prompt_token_ids"]) < params.max_tokens
        self.ids[name], self.made[name], self.prompts[name] = list(prompt["prompt_token_ids"]), [], prompt

    def step(self):
        self.idle = not self.idle
        if self.idle:
            return []
        waiting = [name for name, made in self.made.items() if not made]
        names = [name for name, made in self.made.items() if made] + waiting[:1]
        for name in names:
            logits = self.model(torch.tensor([self.ids[name] + self.made[name]])).logits[0, -1]
            self.made[name].append(int(logits.argmax()))
        return [SimpleNamespace(request_id=n, outputs=[SimpleNamespace(token_ids=self.made[n])]) for n in names]

    def abort_request(self, names):
        for name in names:
            del self.ids[name], self.made[name]


class LLM:
    def __init__(self, model, **settings):
        assert settings["dtype"] == "float32" and settings["skip_tokenizer_init"]
        self.model = LlamaForCausalLM.from_pretrained(model, **settings["hf_overrides"]).eval()
        self.llm_engine = Engine(self.model)

    def reset_prefix_cache(self):
        self.llm_engine.prompts.clear()

    def generate(self, prompts, params, use_tqdm):
        (ids,) = (prompt["prompt_token_ids"] for prompt in prompts)
        found = self.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        each = [{ids[i]: SimpleNamespace(logprob=float(found[i - 1, ids[i]]))} for i in range(1, len(ids))]
        return [SimpleNamespace(prompt_logprobs=[None, *each])]


@pytest.fixture
def dense() -> LlamaForCausalLM:
    settings = base_config()
    settings.pop("model_type")
    return shake(LlamaForCausalLM(LlamaConfig(**settings))).eval()


@pytest.fixture
def vllm(monkeypatch) -> None:
    module = ModuleType("vllm")
    module.__spec__ = importlib.machinery.ModuleSpec("vllm", None)
    module.LLM, module.SamplingParams = LLM, SimpleNamespace
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")


@torch.no_grad()
def test_rows_are_encoded_and_decoded(vllm, dense):
    system = VllmSystem(dense)
    assert system.check(tokens(1, 30), 20) < 1e-4
    prompt = tokens(1, 12)
    for shared in (False, True):
        assert system.prepare(prompt, 3, 8, shared) > 0
        salts = {one["cache_salt"] for one in system.llm.llm_engine.prompts.values()}
        assert len(salts) == (1 if shared else 3)
        before = system.kv_bytes()
        assert len(system.decode(4)) == 4
        assert system.kv_bytes() - before == 3 * 4 * system.growing_per_token()
        # Row i was encoded in step i, and the first of them has decoded since.
        held = [12 + 3 - row + 4 for row in range(3)]
        once = 2 * 12 if shared else 0
        assert system.kv_bytes() == accounting.dense_cache_bytes(base_config(), sum(held) - once, 4)
        system.close()
        assert not system.llm.llm_engine.ids
    with pytest.raises(torch.cuda.OutOfMemoryError, match="does not hold 180 tokens"):
        system.prepare(prompt, 9, 8, shared=False)


def test_it_says_that_vllm_is_missing(dense, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(PhotonError, match="vLLM is not installed"):
        VllmSystem(dense)
