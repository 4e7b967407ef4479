"""The dense model under vLLM, where that is installed: the fastest dense baseline of the benchmark."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from typing import Any

import torch
from transformers import PreTrainedModel

from lib.systems import System, relative_error
from photon_train import accounting
from photon_train.errors import PhotonError

LONGEST = 131_072 + 8192  # tokens of a row: the longest prompt of the benchmark and its answer
MEMORY_SHARE = 0.9  # of the GPU, reserved for weights and cache when it starts


class VllmSystem(System):
    """vLLM with its own kernels, scheduler and CUDA graphs, on the weights of `model`.

    `check` starts it, once it has moved `model` to main memory. It encodes the prompt of every row (unless they share
    it); rows that are encoded first are some tokens ahead of the others. The peak of its memory is what it reserves.

    Raises:
        PhotonError: if vLLM is not installed.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        if importlib.util.find_spec("vllm") is None:
            raise PhotonError("vLLM is not installed: install it beside this torch, or leave out --vllm")
        super().__init__("dense-vllm", model)
        self.llm: Any = None
        self._start_over()

    def _start_over(self) -> None:
        self.lengths: dict[str, int] = {}
        self.prompt, self.shared = 0, False

    def check(self, ids: torch.Tensor, given: int) -> float:
        """Of the log-probabilities of the tokens after `given`: vLLM does not give logits."""
        reference = self.model(ids, use_cache=False).logits[0, given - 1 : -1].float().log_softmax(-1)
        reference = reference.gather(1, ids[0, given:, None])[:, 0].cpu()
        if self.llm is None:
            self.llm = self._load()
        import vllm

        tokens = ids[0].tolist()
        params = vllm.SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        found = self.llm.generate([{"prompt_token_ids": tokens}], params, use_tqdm=False)[0].prompt_logprobs
        rows = [found[place][tokens[place]].logprob for place in range(given, len(tokens))]
        return relative_error(torch.tensor(rows), reference)

    def _load(self) -> Any:
        # In this process: the clock then sees its work.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        import vllm

        with tempfile.TemporaryDirectory() as folder:
            self.model.save_pretrained(folder)
            self.model.to("cpu")
            torch.cuda.empty_cache()
            return vllm.LLM(
                model=folder,
                skip_tokenizer_init=True,
                dtype=str(self.model.dtype).removeprefix("torch."),
                max_model_len=LONGEST,
                hf_overrides={"max_position_embeddings": LONGEST},
                gpu_memory_utilization=MEMORY_SHARE,
                max_num_seqs=1024,
                enable_prefix_caching=True,
                seed=0,
            )

    def prepare(self, prompt: torch.Tensor, batch: int, room: int, shared: bool) -> float:
        import vllm

        tokens = prompt[0].tolist()
        params = vllm.SamplingParams(
            temperature=0.0, max_tokens=LONGEST - len(tokens), ignore_eos=True, detokenize=False
        )
        cache = self.llm.llm_engine.vllm_config.cache_config
        need = (1 if shared else batch) * len(tokens) + batch * room
        if need > cache.num_gpu_blocks * cache.block_size:
            # The benchmark then tries half of the rows; vLLM would let some of them wait.
            raise torch.cuda.OutOfMemoryError(f"vLLM's cache does not hold {need} tokens")
        self.llm.reset_prefix_cache()
        self.prompt, self.shared = len(tokens), shared
        began, seconds = self.clock.now(), None
        for index in range(batch):
            # Pages are shared by equal salts only.
            salted = {"prompt_token_ids": tokens, "cache_salt": "prompt" if shared else f"row {index}"}
            self.llm.llm_engine.add_request(str(index), salted, params)
            self.lengths[str(index)] = len(tokens)
            if seconds is None:
                self._step()
                seconds = self.clock.now() - began
        while min(self.lengths.values()) == len(tokens):
            self._step()
        return seconds

    def _step(self) -> int:
        """Run it until tokens are there; their number."""
        outputs = []
        while not outputs:
            outputs = [one for one in self.llm.llm_engine.step() if one.outputs and one.outputs[0].token_ids]
        for one in outputs:
            self.lengths[one.request_id] = self.prompt + len(one.outputs[0].token_ids)
        return len(outputs)

    def decode(self, steps: int) -> list[float]:
        times, began = [], self.clock.now()
        for _ in range(steps):
            ran = self._step()
            if ran != len(self.lengths):
                raise torch.cuda.OutOfMemoryError(f"vLLM's cache holds {ran} of {len(self.lengths)} rows")
            times.append(self.clock.now() - began)
            began += times[-1]
        return times

    def kv_bytes(self) -> int:
        once = self.prompt if self.shared else 0
        return self.bytes_at(once + sum(length - once for length in self.lengths.values()))

    def bytes_at(self, tokens: int) -> int:
        return accounting.dense_cache_bytes(self.model.config, tokens, self.model.dtype.itemsize)

    def growing_per_token(self) -> float:
        return float(self.bytes_at(1))

    def step_bytes(self, tokens: int, batch: int) -> float:
        return self.weights_bytes() + batch * self.bytes_at(tokens)

    def close(self) -> None:
        if self.lengths:
            self.llm.llm_engine.abort_request(list(self.lengths))
        self._start_over()
