"""Which sequences run in a step: admission by memory, chunked prefill, preemption.

First come, first served. A sequence is admitted when a row and the blocks of its whole prompt are free. When decoding
needs a block and none is free, kept prefixes go first; then the youngest running sequence is swapped out: its state is
copied to main memory bit by bit, so that nothing is lost or computed again (what PHOTON keeps per sequence is small).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import torch

from photon_train.inference.blocks import Allocation
from photon_train.inference.cache import PagedCache
from photon_train.inference.prefix import PrefixCache
from photon_train.inference.request import Sequence


@dataclass
class Plan:
    """The work of one step.

    Attributes:
        ready: Sequences whose whole prompt was known, with the logits of the next token.
        prefill: Sequences and how many of their prompt's tokens to feed.
        decode: Sequences that get one token.
    """

    ready: list[tuple[Sequence, torch.Tensor]] = field(default_factory=list)
    prefill: list[tuple[Sequence, int]] = field(default_factory=list)
    decode: list[Sequence] = field(default_factory=list)


class Scheduler:
    """Waiting and running sequences.

    Args:
        cache: Rows and blocks.
        prefixes: Kept prefixes.
        max_running: Sequences that run at a time.
        segment_tokens: Tokens of a prefill segment; segments end at multiples of it.
        step_tokens: Prompt tokens fed in one step, of all sequences together.
    """

    def __init__(
        self,
        cache: PagedCache,
        prefixes: PrefixCache,
        max_running: int,
        segment_tokens: int,
        step_tokens: int,
    ) -> None:
        self.cache, self.prefixes = cache, prefixes
        self.max_running, self.segment_tokens, self.step_tokens = max_running, segment_tokens, step_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.num_preemptions = 0

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, finished or not."""
        if sequence in self.running:
            self.running.remove(sequence)
            self.cache.close(sequence.allocation)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        sequence.allocation = sequence.saved = None

    def plan(self) -> Plan:
        """Choose the work of the next step, and make room for it."""
        plan = Plan()
        for sequence in [s for s in self.running if not s.in_prefill]:
            if self._make_room(sequence):
                plan.decode.append(sequence)
        self._admit(plan)
        left = self.step_tokens
        for sequence in self.running:
            if sequence.in_prefill and left > 0:
                length = sequence.allocation.length
                boundary = (length // self.segment_tokens + 1) * self.segment_tokens
                plan.prefill.append((sequence, min(boundary, len(sequence.prompt)) - length))
                left -= plan.prefill[-1][1]
        return plan

    def _make_room(self, sequence: Sequence) -> bool:
        """Reserve the block of a running sequence's next token; False if it was swapped out."""
        while sequence.allocation is not None:
            if self.cache.reserve(sequence.allocation, sequence.allocation.length + 1):
                return True
            if not self.prefixes.evict():
                self._preempt(self.running[-1])
        return False

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        sequence.saved, sequence.allocation = self.cache.swap_out(sequence.allocation), None
        self.waiting.appendleft(sequence)
        self.num_preemptions += 1

    def _admit(self, plan: Plan) -> None:
        deferred = []
        try:
            while self.waiting and len(self.running) < self.max_running:
                sequence = self.waiting.popleft()
                if self._is_being_encoded(sequence):
                    deferred.append(sequence)
                elif self._start(sequence, plan):
                    self.running.append(sequence)
                else:
                    # Whoever comes later waits too: nobody is overtaken for want of memory.
                    self.waiting.appendleft(sequence)
                    break
        finally:
            self.waiting.extendleft(reversed(deferred))

    def _is_being_encoded(self, sequence: Sequence) -> bool:
        """Whether a longer prefix of the prompt than is kept will be there once a running prefill has passed it."""
        if sequence.saved is not None or self.prefixes.max_prefixes == 0 or sequence.params.prompt_logprobs is not None:
            return False
        found = self.prefixes.find(sequence.keys)
        known = found.allocation.length if found else 0
        coming = {
            key
            for other in self.running
            if other.in_prefill
            for length, key in other.keys
            if length > max(known, other.allocation.length)
        }
        return any(key in coming for _, key in sequence.keys)

    def _start(self, sequence: Sequence, plan: Plan) -> bool:
        """Give a waiting sequence a row, its blocks and the longest kept prefix; False if there is no room."""
        while True:
            if sequence.saved is not None:
                room = max(sequence.saved.length + 1, len(sequence.prompt))
                sequence.allocation = self.cache.swap_in(sequence.saved, room)
                if sequence.allocation is not None:
                    sequence.saved = None
                    if not sequence.in_prefill:
                        plan.decode.append(sequence)
                    return True
            elif self._start_from_prefix(sequence, plan):
                return True
            if not self.prefixes.evict():
                return False

    def _start_from_prefix(self, sequence: Sequence, plan: Plan) -> bool:
        # Whoever wants the log-probabilities of the prompt has it encoded.
        prefix = None if sequence.params.prompt_logprobs is not None else self.prefixes.find(sequence.keys)
        allocation: Allocation | None = self.cache.fork(prefix.allocation) if prefix else self.cache.open_sequence()
        if allocation is None:
            return False
        if not self.cache.reserve(allocation, len(sequence.prompt)):
            self.cache.close(allocation)
            return False
        sequence.allocation = allocation
        self.prefixes.hit_tokens += allocation.length
        if not sequence.in_prefill:
            plan.ready.append((sequence, prefix.logits))
        return True
