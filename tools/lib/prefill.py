"""Prefill on a CPU: a graft under its engine against the dense model that it holds, prompt after prompt, in turns."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable
from typing import Any

import torch
from transformers import DynamicCache, LlamaForCausalLM

from lib.cases import Prefill
from lib.shapes import dense_shape, photon_shape
from lib.systems import Clock, PhotonSystem, relative_error
from photon_train.accounting import dense_flops, photon_flops
from photon_train.conversion.graft import format_cells
from photon_train.errors import PhotonError
from photon_train.models import PhotonForCausalLM

DENSE, GRAFT = "dense-sdpa", "graft"
_WARM_TOKENS = 512


class PrefillBench:
    """Both models, with the same random weights in fp32.

    The dense model reads a prompt in one pass under transformers: PyTorch's attention without a mask, a dynamic cache,
    the logits of the last token. The graft has the preset's own window, and the engine its default settings;
    the engine's cache is allocated before the clock starts.

    Attributes:
        errors: Relative errors of logits, found by `check`.
        rows: What `run` has found.
    """

    def __init__(self, case: Prefill, backend: str = "torch") -> None:
        torch.manual_seed(0)
        config = dense_shape(case.shape, case.layers)
        self.case, self.dense = case, LlamaForCausalLM(config).eval()
        graft = PhotonForCausalLM(photon_shape(config, GRAFT)).eval()
        found = graft.load_state_dict(self.dense.state_dict(), strict=False, assign=True)
        if found.unexpected_keys or not all(".memory." in name for name in found.missing_keys):
            raise PhotonError(f"the graft does not hold the dense model: {found}")
        graft.set_backend(backend)
        self.graft, self.system = graft, PhotonSystem(GRAFT, graft)
        self.clock, self.errors, self.rows = Clock(torch.device("cpu")), {}, []

    def check(self) -> None:
        """Compare the graft's logits with the dense model's (as its teacher), and the engine's with one pass's.

        Raises:
            PhotonError: if they differ by more than rounding.
        """
        length = 2 * self.graft.config.window + 88  # most of it beyond the window
        ids = self._prompt(length)
        expected = self.dense(ids, use_cache=False).logits
        self.errors = {
            "graft as the dense model": relative_error(
                self.graft(ids, as_dense=True, use_cache=False).logits, expected
            ),
            "graft under the engine": self.system.check(ids, length - 40),
        }
        for name, error in self.errors.items():
            if not error < self.system.tolerance:
                raise PhotonError(f"prefill: {name} computes something else: relative error {error:.2g}")
            print(f"prefill: {name}: relative error {error:.1g}", flush=True)

    def expected_seconds(self) -> float:
        """What `run` will take, from a short prompt of each model (its warm-up) and the FLOPs of the long ones."""
        total = 0.0
        for name, run in self._runs().items():
            rate = run(self._prompt(_WARM_TOKENS)) / self._flops(name, _WARM_TOKENS)
            total += self.case.turns * sum(rate * self._flops(name, context) for context in self.case.contexts)
        return total

    def run(self, on_rows: Callable[[], None]) -> None:
        """Measure; `on_rows` is called when a context is done."""
        for context in self.case.contexts:
            prompt, seconds = self._prompt(context), {DENSE: [], GRAFT: []}
            for _ in range(self.case.turns):
                for name, run in self._runs().items():
                    seconds[name].append(run(prompt))
            for name, took in seconds.items():
                ratios = [dense / own for dense, own in zip(seconds[DENSE], took, strict=True)]
                self.rows.append(
                    {
                        "context": context,
                        "system": name,
                        "seconds": took,
                        "tokens_per_s": context / statistics.median(took),
                        "prefill_ratio": statistics.median(ratios),
                        "prefill_ratio_min": min(ratios),
                    }
                )
            on_rows()

    def record(self) -> dict[str, Any]:
        """The rows, and what was measured."""
        config = self.graft.config
        return {
            "shape": self.case.shape,
            "layers": config.num_hidden_layers,
            "window": config.window,
            "chunk_size": config.chunk_size,
            "memory_layers": config.memory_layers,
            "memory_cells": format_cells(config.memory_cells),
            "memory_bits": config.memory_bits,
            "turns": self.case.turns,
            "relative_errors": self.errors,
            "rows": self.rows,
        }

    def _prompt(self, length: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(length)
        return torch.randint(3, self.dense.config.vocab_size, (1, length), generator=generator)

    def _runs(self) -> dict[str, Callable[[torch.Tensor], float]]:
        return {DENSE: self._run_dense, GRAFT: self._run_graft}

    def _run_dense(self, prompt: torch.Tensor) -> float:
        gc.collect()
        began = self.clock.now()
        cache = DynamicCache(config=self.dense.config)
        self.dense(prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return self.clock.now() - began

    def _run_graft(self, prompt: torch.Tensor) -> float:
        gc.collect()
        seconds = self.system.prepare(prompt, batch=1, room=1, shared=False)
        self.system.close()
        return seconds

    def _flops(self, name: str, length: int) -> float:
        """Of a prompt: a token has half of it before it in the mean, and the head works once."""
        config = self.graft.config
        each = photon_flops(config, length // 2) if name == GRAFT else dense_flops(self.dense.config, length // 2)
        return length * each - 2.0 * (length - 1) * config.vocab_size * config.hidden_size
