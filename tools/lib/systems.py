"""What a benchmark compares: the dense model under transformers' `generate`, and PHOTON under its engine.

A system encodes one prompt, copies what its cache then holds to every row of a batch, and decodes.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod

import torch
from transformers import DynamicCache, PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from lib import baselines, roofline
from photon_train import accounting
from photon_train.errors import PhotonError
from photon_train.inference.engine import Engine, EngineSettings
from photon_train.inference.request import SamplingParams, Sequence

SINKS = 4  # of the dense model with a window
_NO_LIMITS = roofline.Device("", 1.0, math.inf, math.inf)


class Clock:
    """Seconds, with the device's work done: on a CPU those of this process, which other work on the machine adds less
    to, so let one thread compute."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def now(self) -> float:
        """Read the clock, after the device's work."""
        if self.device.type != "cuda":
            return time.process_time()
        torch.cuda.synchronize(self.device)
        return time.perf_counter()


class System(ABC):
    """A model with a way to decode.

    Attributes:
        name: In the results.
        model: Its weights.
        period: Decoding steps after which the work repeats.
        tolerance: Relative error of its logits in fp32 that is not a mistake.
    """

    period = 1
    tolerance = 1e-4

    def __init__(self, name: str, model: PreTrainedModel) -> None:
        self.name, self.model = name, model
        self.clock = Clock(model.device)

    @abstractmethod
    def prepare(self, prompt: torch.Tensor, batch: int, room: int, shared: bool) -> float | None:
        """Fill the caches of `batch` rows with ``prompt [1, T]``, with room for `room` tokens more.

        `shared`: the rows are continuations of one prompt; who can lets them share its cache. Returns the seconds from
        one prompt to its first token's logits, None if it was not encoded.
        """

    @abstractmethod
    def decode(self, steps: int) -> list[float]:
        """Seconds of each of `steps` tokens of all rows."""

    @abstractmethod
    def check(self, ids: torch.Tensor, given: int) -> float:
        """Relative error of the logits decoded after `given` of ``ids [1, T]`` against one pass over all of them."""

    @abstractmethod
    def kv_bytes(self) -> int:
        """Bytes that the rows' caches hold now."""

    @abstractmethod
    def bytes_at(self, tokens: int) -> int:
        """Bytes of one row's cache by formula."""

    @abstractmethod
    def growing_per_token(self) -> float:
        """Bytes by which a row's cache grows."""

    @abstractmethod
    def step_bytes(self, tokens: int, batch: int) -> float:
        """Bytes of weights and caches that a decoding step has to read."""

    @abstractmethod
    def close(self) -> None:
        """Free the caches."""

    def weights_bytes(self) -> int:
        """Bytes of the parameters, a tied one once."""
        return sum(p.numel() * p.element_size() for p in self.model.parameters())


class _StepTimes(StoppingCriteria):
    """Notes when each token of `generate` is there; never stops."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.times = clock, []

    def __call__(self, input_ids, scores, **kwargs):
        self.times.append(self.clock.now())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


class DenseSystem(System):
    """The dense model under `generate`, not compiled.

    Args:
        kind: Its cache, one of `baselines.KINDS`.
        window: Tokens that kind `window` looks back on.
        encoded: The cache of the last encoded prompt by its length, and the seconds it took; shared by the kinds.
        longest: Prompts longer than this are not encoded; their caches are filled at random. None: all are.
    """

    def __init__(
        self, kind: str, model: PreTrainedModel, window: int, encoded: dict, longest: int | None = None
    ) -> None:
        super().__init__(f"dense-{kind}", model)
        self.kind, self.window, self.encoded, self.longest = kind, window, encoded, longest
        if kind == "fp8":
            self.tolerance = 0.2

    def prepare(self, prompt: torch.Tensor, batch: int, room: int, shared: bool) -> float | None:
        length = prompt.shape[1]
        if length not in self.encoded:
            self.encoded.clear()
            self.encoded[length] = self._encode(prompt)
        filled, seconds = self.encoded[length]
        self.cache = baselines.repeated(self.model, filled, self.kind, batch, room + 1, self.window, SINKS)
        self.ids = prompt.expand(batch, -1)
        return seconds

    def _encode(self, prompt: torch.Tensor) -> tuple[DynamicCache, float | None]:
        """The cache of all but the last token, which the first decoding step feeds; kept in main memory."""
        length = prompt.shape[1] - 1
        if self.longest is not None and length >= self.longest:
            return baselines.filled_at_random(self.model, length, "cpu"), None
        self.clock.now()  # the first use of a device is slow
        baselines.encode(self.model, prompt[:, :64])
        began = self.clock.now()
        filled = baselines.encode(self.model, prompt[:, :-1])
        seconds = self.clock.now() - began
        for layer in filled.layers:
            layer.keys, layer.values = layer.keys.cpu(), layer.values.cpu()
        return filled, seconds

    def decode(self, steps: int) -> list[float]:
        watch = _StepTimes(self.clock)
        began = self.clock.now()
        self.ids = self.model.generate(
            self.ids,
            past_key_values=self.cache,
            max_new_tokens=steps,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            disable_compile=True,
            stopping_criteria=StoppingCriteriaList([watch]),
        )
        return [after - before for before, after in zip([began, *watch.times], watch.times, strict=False)]

    def check(self, ids: torch.Tensor, given: int) -> float:
        mask, prompt = None, ids[:, :given]
        if self.kind == "window":
            mask = baselines.window_mask(ids.shape[1], self.window, SINKS, ids.device)
            filled = baselines.encode_windowed(self.model, prompt, self.window, SINKS)
        else:
            filled = baselines.encode(self.model, prompt)
        reference = self.model(ids, attention_mask=mask, use_cache=False).logits[0, given:]
        cache = baselines.repeated(self.model, filled, self.kind, 2, ids.shape[1], self.window, SINKS)
        rows = [
            self.model(ids[:, place, None].expand(2, 1), past_key_values=cache).logits[1, 0]
            for place in range(given, ids.shape[1])
        ]
        return relative_error(torch.stack(rows), reference)

    def kv_bytes(self) -> int:
        return baselines.cache_bytes(self.cache)

    def bytes_at(self, tokens: int) -> int:
        held = min(tokens, SINKS + self.window) if self.kind == "window" else tokens
        return accounting.dense_cache_bytes(self.model.config, held, self._kv_size)

    def growing_per_token(self) -> float:
        return 0.0 if self.kind == "window" else float(self.bytes_at(1))

    def step_bytes(self, tokens: int, batch: int) -> float:
        return self.weights_bytes() + batch * self.bytes_at(tokens)

    @property
    def _kv_size(self) -> int:
        return 1 if self.kind == "fp8" else self.model.dtype.itemsize

    def close(self) -> None:
        self.cache = None


class PhotonSystem(System):
    """PHOTON under its engine; the rows' phases within a unit are spread evenly, as those of many requests are."""

    def __init__(self, name: str, model: PreTrainedModel, cuda_graphs: str = "auto") -> None:
        super().__init__(name, model)
        self.cuda_graphs, self.period = cuda_graphs, accounting.costs_of(model.config).unit

    def prepare(self, prompt: torch.Tensor, batch: int, room: int, shared: bool) -> float:
        tokens = prompt[0].tolist()
        longest = len(tokens) + room + self.period + 1
        settings = {"max_sequences": batch, "max_prefixes": 0, "max_length": longest, "cuda_graphs": self.cuda_graphs}
        self.engine = engine = Engine(self.model, settings=EngineSettings(**settings))
        params = SamplingParams(max_new_tokens=room + self.period + 1, ignore_eos=True)
        began = self.clock.now()
        number = engine.add(tokens, params)
        while not engine.step():
            pass
        seconds = self.clock.now() - began
        first = engine._open[number][0]
        others = [Sequence(number, i, tokens, params, [], output=list(first.output)) for i in range(1, batch)]
        for sequence in others:
            sequence.allocation = engine.cache.fork(first.allocation, share=shared)
        engine._open[number] += others
        engine.scheduler.running += others
        self._spread_phases([first, *others])
        return seconds

    def _spread_phases(self, sequences: list[Sequence]) -> None:
        """Feed row i a further ``i % period`` tokens."""
        for extra in range(1, self.period):
            ahead = [one for place, one in enumerate(sequences) if place % self.period >= extra]
            if not ahead:
                return
            for one in ahead:
                self.engine.cache.reserve(one.allocation, one.allocation.length + 1)
            self.engine.runner.decode([(one.allocation, one.output[-1]) for one in ahead])

    def decode(self, steps: int) -> list[float]:
        times, began = [], self.clock.now()
        for _ in range(steps):
            events = self.engine.step()
            if len(events) != self.engine.settings.max_sequences:
                raise PhotonError(f"{self.name}: {len(events)} rows of the batch ran: it does not fit, lower it")
            times.append(self.clock.now() - began)
            began += times[-1]
        return times

    @property
    def phase(self) -> int:
        """Tokens that the first row's open unit has."""
        return self.engine.scheduler.running[0].allocation.length % self.period

    def check(self, ids: torch.Tensor, given: int) -> float:
        settings = EngineSettings(
            max_sequences=2,
            max_prefixes=0,
            max_length=ids.shape[1],
            segment_tokens=64,
            cuda_graphs=self.cuda_graphs,
        )
        engine = Engine(self.model, settings=settings)
        allocation = engine.cache.open_sequence()
        engine.cache.reserve(allocation, ids.shape[1])
        tokens = ids[0].tolist()
        for start in range(0, given, engine.segment_tokens):
            engine.runner.prefill([(allocation, tokens[start : min(given, start + engine.segment_tokens)])])
        rows = [engine.runner.decode([(allocation, token)])[0].clone() for token in tokens[given:]]
        return relative_error(torch.stack(rows), self.model(ids).logits[0, given:])

    def kv_bytes(self) -> int:
        return self.engine.cache.used_bytes(sequence.allocation for sequence in self.engine.scheduler.running)

    def bytes_at(self, tokens: int) -> int:
        return accounting.cache_bytes(self.model.config, tokens, self.model.dtype.itemsize).total

    def growing_per_token(self) -> float:
        return accounting.growing_bytes_per_token(self.model.config, self.model.dtype.itemsize)

    def step_bytes(self, tokens: int, batch: int) -> float:
        size = self.model.dtype.itemsize
        return roofline.photon_bound(self.model.config, tokens, batch, _NO_LIMITS, size).step_bytes

    def close(self) -> None:
        self.engine = None


def relative_error(logits: torch.Tensor, reference: torch.Tensor) -> float:
    """Norm of the difference over the norm of the reference's deviation from its mean."""
    difference = (logits.float() - reference.float()).norm()
    return float(difference / (reference.float() - reference.float().mean()).norm())


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read and written, of the fastest of some large copies."""
    size = 2**30 if device.type == "cuda" else 2**27
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target, clock, best = torch.empty_like(source), Clock(device), math.inf
    for _ in range(8):
        began = clock.now()
        target.copy_(source)
        best = min(best, clock.now() - began)
    return 2 * size / best
