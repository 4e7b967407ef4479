"""The Triton backend against the torch backend and the whole sequence at once (interpreter on a CPU, or a GPU)."""

from __future__ import annotations

import pytest
import torch
from tiny import GRAFTS, photon_model, tokens
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton import JITFunction
from triton.runtime.interpreter import InterpretedFunction

from photon_train.inference.cache import CacheLayout, PagedCache
from photon_train.inference.engine import Engine, EngineSettings
from photon_train.inference.graphs import StaticCalls
from photon_train.inference.request import SamplingParams
from photon_train.inference.runner import Runner
from photon_train.models.memory_segment_photon import MemorySegment

# One of each kind of layer: rings with and without sinks, memory in one part and in two, full attention.
SOME = ["window", "memory", "memory-apart", "memory-full"]
# The first units of one row leave the window on the way, those of the other have left it.
WIDTHS, COUNT = (4, 14), 5


def rows_of(device: str) -> list[torch.Tensor]:
    return [tokens(1, COUNT + width, seed=width).to(device) for width in WIDTHS]


def in_one_pass(model, rows: list[torch.Tensor]) -> torch.Tensor:
    """Logits of the last `COUNT` tokens of each row, ``[B, COUNT, V]``, from the whole sequence at once."""
    return torch.stack([model(row, use_cache=False).logits[0, -COUNT:] for row in rows])


def from_a_contiguous_cache(model, rows: list[torch.Tensor]) -> torch.Tensor:
    """The same token by token, after prompts padded on the left."""
    prompt = torch.full((len(rows), max(WIDTHS)), 2, device=rows[0].device)
    mask = torch.zeros_like(prompt)
    for index, width in enumerate(WIDTHS):
        prompt[index, -width:], mask[index, -width:] = rows[index][0, :width], 1
    cache, steps = model(prompt, attention_mask=mask, use_cache=True).past_key_values, []
    for step in range(COUNT):
        column = torch.stack([row[0, width + step] for row, width in zip(rows, WIDTHS, strict=True)])
        steps.append(model(column[:, None], past_key_values=cache).logits[:, 0])
    return torch.stack(steps, dim=1)


def from_a_paged_cache(model, rows: list[torch.Tensor]) -> torch.Tensor:
    """The same from blocks that lie out of order."""
    span = model.config.chunk_size if model.config.memory_layers else 1
    layout = CacheLayout.fit(model, 2**20, num_rows=5, block_size=2 * span, max_length=32)
    cache = PagedCache(model, layout)
    runner = Runner(model, cache)
    # Others have come and gone: rows and blocks in use begin nowhere near zero.
    others = [cache.open_sequence() for _ in range(3)]
    assert all(cache.reserve(other, 2 * span) for other in others)
    cache.close(others[0])
    sequences = [cache.open_sequence() for _ in rows]
    for sequence, row in zip(sequences, rows, strict=True):
        assert cache.reserve(sequence, row.shape[1])
    runner.prefill([(one, row[0, :width].tolist()) for one, row, width in zip(sequences, rows, WIDTHS, strict=True)])
    steps = []
    for step in range(COUNT):
        work = [(one, int(row[0, width + step])) for one, row, width in zip(sequences, rows, WIDTHS, strict=True)]
        # The order of a batch is nobody's business.
        steps.append(runner.decode(work[::-1]).flip(0) if step % 2 else runner.decode(work))
    return torch.stack(steps, dim=1)


@pytest.mark.parametrize("decode", [from_a_contiguous_cache, from_a_paged_cache])
@torch.no_grad()
def test_sink_logits_are_in_every_softmax_of_the_kernels_once(decode, triton_device):
    """Local layers, memory and full attention; shares of the sinks that show."""
    kinds = ["sliding_attention", "full_attention", "full_attention"]
    family = {"num_local_experts": 3, "num_experts_per_tok": 2, "sliding_window": 6, "layer_types": kinds}
    cells = {"memory_cells": {2: [0]}, "full_attention_layers": [1]}
    model = photon_model("memory-full", "gpt_oss", **family, **cells).to(triton_device)
    rows = rows_of(triton_device)
    expected = in_one_pass(model, rows)
    model.set_backend("triton")
    torch.testing.assert_close(decode(model, rows), expected, atol=2e-4, rtol=0)
    for layer in model.model.layers:
        layer.self_attn.sinks.fill_(-30.0)
    assert (in_one_pass(model, rows) - expected).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("name", "decode"),
    [(name, from_a_contiguous_cache) for name in sorted(GRAFTS)] + [(name, from_a_paged_cache) for name in SOME],
)
@torch.no_grad()
def test_triton_logits_equal_torch_logits_and_one_pass(name, decode, triton_device, monkeypatch):
    model = photon_model(name).to(triton_device)
    rows = rows_of(triton_device)
    expected = in_one_pass(model, rows)
    torch.testing.assert_close(decode(model, rows), expected, atol=2e-4, rtol=0)
    model.set_backend("triton")
    launched = record_launches(monkeypatch)
    torch.testing.assert_close(decode(model, rows), expected, atol=2e-4, rtol=0)
    config = model.config
    wanted = {"cache_append_triton", "window_decode_attention_triton"}
    memory = {"unit_pack_triton", "latent_queries_triton", "latent_decode_triton", "latent_outputs_triton"}
    wanted |= memory if config.memory_layers else set()
    wanted |= {"paged_decode_attention_triton"} if config.full_attention_layers else set()
    assert launched == wanted


def record_launches(monkeypatch) -> set[str]:
    """Names of the launchers that run from here on: none may have been passed by."""
    import importlib

    launched: set[str] = set()
    names = ["cache_append", "window_decode_attention", "latent_decode", "paged_decode_attention"]
    for name in (*names, "unit_pack", "latent_queries", "latent_outputs"):
        module = importlib.import_module(f"photon_kernels.{name.removesuffix('_attention')}.triton")
        launcher = getattr(module, f"{name}_triton")

        def recorded(*args, launcher=launcher, **settings):
            launched.add(launcher.__name__)
            return launcher(*args, **settings)

        monkeypatch.setattr(module, launcher.__name__, recorded)
    return launched


LAUNCHES = 8  # a memory layer's in a decoding step: two stores, a window, five for what is far


class Counted(TorchDispatchMode):
    """Operations that take a launch of their own, by name: views and fresh memory take none."""

    FREE = {"view", "expand", "select", "slice", "unsqueeze", "squeeze", "transpose", "split", "as_strided", "detach"}
    FREE |= {"_unsafe_view", "alias", "empty", "new_empty", "empty_strided", "empty_like", "unbind", "permute"}

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, arguments=(), settings=None):
        name = function.overloadpacket.__name__
        if name not in self.FREE:
            self.names.append(name)
        return function(*arguments, **(settings or {}))


@pytest.mark.parametrize("name", ["memory", "memory-apart", "memory-4-bits"])
@torch.no_grad()
def test_a_memory_layer_decodes_in_few_launches(name, triton_device, monkeypatch):
    """On a GPU a step is bound by their number. The last layer's: what layers share is there already."""
    model = photon_model(name).to(triton_device)
    model.set_backend("triton")
    layout = CacheLayout.fit(model, 2**20, num_rows=2, block_size=2 * model.config.chunk_size, max_length=32)
    cache = PagedCache(model, layout)
    runner = Runner(model, cache, StaticCalls(cache, 2, 16, capture=False))
    sequences = [cache.open_sequence() for _ in range(2)]
    assert all(cache.reserve(one, 24) for one in sequences)
    runner.prefill([(one, tokens(1, 17 + row)[0].tolist()) for row, one in enumerate(sequences)])
    kernels: list[str] = []

    def count_launches(kind: type) -> None:
        run = kind.__getitem__

        def launched(self, grid):
            def launch(*arguments, **settings):
                kernels.append(self.fn.__name__)
                with _disable_current_modes():  # what the interpreter does for a kernel is one launch
                    return run(self, grid)(*arguments, **settings)

            return launch

        monkeypatch.setattr(kind, "__getitem__", launched)

    for kind in (InterpretedFunction, JITFunction):
        count_launches(kind)
    last, attend = max(model.config.memory_layers), MemorySegment.attend

    def counted(self, module, *arguments, **settings):
        if module.layer_idx != last:
            return attend(self, module, *arguments, **settings)
        kernels.clear()
        with Counted() as operations:
            found = attend(self, module, *arguments, **settings)
        steps.append((operations.names, list(kernels)))
        return found

    monkeypatch.setattr(MemorySegment, "attend", counted)
    steps: list[tuple[list[str], list[str]]] = []
    for _ in range(2):  # the first makes what later ones find
        runner.decode([(one, 5) for one in sequences])
    operations, launches = steps[-1]
    assert (operations, len(launches)) == ([], LAUNCHES), (operations, launches)


def test_generate_writes_the_same_on_triton(triton_device):
    """The contiguous cache of `generate`, whose rows agree on their lengths; beams copy rows."""
    model = photon_model("memory-full").to(triton_device)
    prompt = tokens(2, 12, seed=5).to(triton_device)
    settings = {"max_new_tokens": 5, "num_beams": 2, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}
    written = []
    for backend in ("torch", "triton"):
        model.set_backend(backend)
        written.append(model.generate(prompt, **settings))
    assert torch.equal(*written)


def run_engine(model, static: bool = False) -> list[tuple[list[int], torch.Tensor]]:
    """Tokens and their log-probabilities of requests of several lengths, one of which has two continuations."""
    span = model.config.chunk_size if model.config.memory_layers else 1
    settings = {"max_sequences": 3, "max_prefixes": 0, "max_length": 64, "block_size": 4 * span, "segment_tokens": 7}
    engine = Engine(model, settings=EngineSettings(**settings, cuda_graphs="off"))
    if static:
        engine.runner = Runner(model, engine.cache, engine.static_calls(capture=False))
    prompts = [tokens(1, length, seed=length)[0].tolist() for length in (3, 9, 17)]
    params = [SamplingParams(max_new_tokens=3 + index, n=1 + index % 2, ignore_eos=True) for index in range(3)]
    answers = [answer for answers in engine.generate(prompts, params) for answer in answers]
    return [(answer.tokens, torch.tensor(answer.logprobs)) for answer in answers]


@pytest.mark.parametrize(
    ("name", "static"), [("memory", False), ("memory-apart", False), ("memory-full", False), ("memory-full", True)]
)
def test_the_engine_decodes_the_same_on_triton(name, static, triton_device):
    model = photon_model(name).to(triton_device)
    expected = run_engine(model)
    model.set_backend("triton")
    found = run_engine(model, static)
    assert [tokens for tokens, _ in found] == [tokens for tokens, _ in expected]
    for (_, mine), (_, theirs) in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-4, rtol=0)


def test_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="backend 'cuda' is not one of torch, triton"):
        photon_model("memory").set_backend("cuda")
