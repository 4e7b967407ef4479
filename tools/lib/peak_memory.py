"""Peak memory of tensors: what a model, its training and their libraries ask torch for, on a GPU or a CPU."""

from __future__ import annotations

import torch
from torch.autograd.profiler import profile, record_function

_MARK = "photon_peak_memory"


class PeakMemory:
    """Bytes of all live tensors at their highest, between `start` and `stop` inside the context.

    On a GPU these are the caching allocator's (`torch.cuda.max_memory_allocated`). On a CPU torch keeps no such count:
    its profiler reports every allocation and release of the CPU allocator, temporary buffers inside of operators and
    those of DeepSpeed included; they are summed from the beginning of the context on. So enter it before the model is
    made, and not while an earlier context's tensors wait to be released. Python, the libraries' code, tensors mapped
    from files and fragmentation do not count.

    Attributes:
        peak: Highest sum of live bytes between `start` and `stop`.
        before: Live bytes at `start`.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.peak = self.before = 0
        self._profile = None if self.device.type == "cuda" else profile(profile_memory=True)

    def __enter__(self) -> PeakMemory:
        if self._profile is not None:
            self._profile.__enter__()
        return self

    def start(self) -> None:
        """Begin the part whose peak is asked for."""
        if self._profile is None:
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device)
        else:
            with record_function(_MARK):
                pass

    def stop(self) -> None:
        """End that part. A later `start` and `stop` replace what was found."""
        if self._profile is None:
            torch.cuda.synchronize(self.device)
            self.peak = torch.cuda.max_memory_allocated(self.device)
        else:
            with record_function(_MARK):
                pass

    def __exit__(self, *error: object) -> None:
        if self._profile is None:
            return
        self._profile.__exit__(*error)
        events = [e for e in self._profile.kineto_results.events() if e.name() in ("[memory]", _MARK)]
        live, marks = 0, 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            if event.name() == _MARK:
                marks += 1
                if marks % 2:
                    self.before = self.peak = live
            else:
                live += event.nbytes()
                self.peak = max(self.peak, live) if marks % 2 else self.peak
