"""The engine in a thread of its own, for a server whose requests arrive in an event loop."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from photon_train.errors import PhotonError
from photon_train.inference.engine import Engine, Prompt
from photon_train.inference.metrics import Metrics
from photon_train.inference.request import Event, SamplingParams

logger = logging.getLogger(__name__)


FAILURES_TO_UNHEALTHY = 3  # steps that fail in a row
RETRY_AFTER_S = 1


class RequestFailed(RuntimeError):
    """A request that was accepted has no answer, through no fault of its client."""


class NotServing(PhotonError):
    """The engine's thread does not run, or is about to end."""


class Busy(PhotonError):
    """Too many requests wait."""


@dataclass(eq=False)
class Ticket:
    """One request on its way through the engine; iterating over it yields its events.

    Attributes:
        prompt, params: What is asked.
        loop: Event loop that waits for the answer.
        accepted: The number of the request, or why it was refused.
        events: What has come; an exception if the engine failed.
        open: Continuations that have not ended.
        arrived, begun: When it came (`time.monotonic`), and whether a token has.
    """

    prompt: Prompt
    params: SamplingParams
    loop: asyncio.AbstractEventLoop
    accepted: Future = field(default_factory=Future)
    events: asyncio.Queue = field(default_factory=asyncio.Queue)
    open: int = 0
    arrived: float = field(default_factory=time.monotonic)
    begun: bool = False

    def give(self, item: Event | Exception) -> None:
        """From the engine's thread: pass on an event."""
        try:
            self.loop.call_soon_threadsafe(self.events.put_nowait, item)
        except RuntimeError:  # the loop is closed: nobody waits any more
            pass

    async def __aiter__(self) -> AsyncIterator[Event]:
        left = self.params.n
        while left:
            item = await self.events.get()
            if isinstance(item, Exception):
                raise item
            left -= item.finish_reason is not None
            yield item


class Worker:
    """A thread that owns an engine: only it touches model and cache.

    Args:
        max_waiting: Continuations that wait for their turn at most.

    Attributes:
        failures: Steps that have failed in a row.
        metrics: What has been done.
    """

    def __init__(self, engine: Engine, max_waiting: int = 1024) -> None:
        if max_waiting < 1:
            raise PhotonError(f"max_waiting={max_waiting} must be at least 1")
        self.engine, self.max_waiting = engine, max_waiting
        self.failures, self.metrics = 0, Metrics()
        self._wake = threading.Condition()
        self._new: deque[Ticket] = deque()
        self._dropped: deque[Ticket] = deque()
        self._running: dict[int, Ticket] = {}
        self._serving = False
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to serve."""
        self._serving = True
        self._thread = threading.Thread(target=self._work, name="photon-engine", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End after the step that is being computed; unfinished requests fail, later ones are refused."""
        with self._wake:
            self._serving = False
            self._wake.notify()
        if self._thread is not None:
            self._thread.join()

    @property
    def is_healthy(self) -> bool:
        """Whether requests are answered: false after `FAILURES_TO_UNHEALTHY` failed steps, until one succeeds."""
        return self._serving and self.failures < FAILURES_TO_UNHEALTHY

    @property
    def num_open(self) -> int:
        """Requests that are not finished."""
        return len(self._running) + len(self._new)

    @property
    def num_waiting(self) -> int:
        """Continuations that wait for their turn."""
        return sum(ticket.params.n for ticket in list(self._new)) + len(self.engine.scheduler.waiting)

    async def submit(self, prompts: Sequence[Prompt], params: SamplingParams) -> list[Ticket]:
        """Queue a request for each of `prompts`, or none; they reach the engine together.

        Raises:
            PhotonError: as `Engine.add`, or for more continuations than may ever wait.
            Busy: if too many wait already.
            NotServing: if the engine's thread does not run.
        """
        loop = asyncio.get_running_loop()
        tickets = [Ticket(prompt, params, loop) for prompt in prompts]
        asked = len(tickets) * params.n
        if asked > self.max_waiting:
            raise PhotonError(f"{asked} continuations are more than the {self.max_waiting} that may wait")
        with self._wake:
            if not self._serving:
                raise NotServing("the server does not take requests: it is shutting down, or its engine has ended")
            if self.num_waiting + asked > self.max_waiting:
                raise Busy(f"{self.num_waiting} continuations wait, of at most {self.max_waiting}: try again later")
            self._new.extend(tickets)
            self._wake.notify()
        try:
            for ticket in tickets:
                await asyncio.wrap_future(ticket.accepted)
        except BaseException:
            for ticket in tickets:
                self.drop(ticket)
            raise
        return tickets

    def drop(self, ticket: Ticket) -> None:
        """Forget a request, finished or not: its client has gone."""
        with self._wake:
            self._dropped.append(ticket)
            self._wake.notify()

    # --- in the engine's thread ---

    def _work(self) -> None:
        try:
            while self._turn():
                pass
        finally:  # whatever it is, no client may wait for ever
            with self._wake:
                self._serving = False
                new = list(self._new)
                self._new.clear()
            self._refuse(new)

    def _turn(self) -> bool:
        """Wait for work and do one step of it; False when it is time to end."""
        with self._wake:
            while not (self._new or self._dropped or not self._serving or self.engine.has_work):
                self._wake.wait()
            if not self._serving:
                return False
            new, dropped = len(self._new), list(self._dropped)
            self._dropped.clear()
        for _ in range(new):
            self._accept()
        for ticket in dropped:
            self._forget(ticket, "dropped")
        if not self.engine.has_work:
            return True
        try:
            events = self.engine.step()
        except Exception as error:
            self._step_failed(error)
            return True
        self.failures = 0
        for event in events:
            self._pass_on(event)
        return True

    def _accept(self) -> None:
        """Hand the first new request to the engine; it counts as new until the engine has it."""
        ticket = self._new[0]
        if not ticket.accepted.set_running_or_notify_cancel():
            self._new.popleft()  # its client went away before it was looked at
            return
        try:
            number = self.engine.add(ticket.prompt, ticket.params)
        except Exception as error:
            self._new.popleft()
            ticket.accepted.set_exception(error)
            return
        ticket.open = ticket.params.n
        self._running[number] = ticket
        self._new.popleft()
        ticket.accepted.set_result(number)

    def _forget(self, ticket: Ticket, outcome: str) -> None:
        for number in [number for number, other in self._running.items() if other is ticket]:
            self.engine.abort(number)
            del self._running[number]
            self.metrics.requests[outcome] += 1

    def _pass_on(self, event: Event) -> None:
        ticket = self._running.get(event.request_id)
        if ticket is None:  # another of its continuations has failed in this step
            return
        if event.error is not None:
            self._forget(ticket, "failed")
            ticket.give(RequestFailed(event.error))
            return
        self._count(ticket, event)
        ticket.open -= event.finish_reason is not None
        if not ticket.open:
            self.engine.result(event.request_id)
            del self._running[event.request_id]
        ticket.give(event)

    def _count(self, ticket: Ticket, event: Event) -> None:
        took = time.monotonic() - ticket.arrived
        self.metrics.generated_tokens += 1
        if not ticket.begun:
            ticket.begun = True
            self.metrics.first_token.observe(took)
        if ticket.open == 1 and event.finish_reason is not None:
            self.metrics.requests["answered"] += 1
            self.metrics.whole.observe(took)

    def _step_failed(self, error: Exception) -> None:
        """Tell the clients of the requests that the engine has dropped."""
        self.failures += 1
        logger.error("a step has failed (%d in a row)", self.failures, exc_info=error)
        first = str(error).strip().partition("\n")[0]
        why = f"the engine failed while it computed this answer: {type(error).__name__}: {first}"
        for number, ticket in list(self._running.items()):
            if not self.engine.is_open(number):
                self._forget(ticket, "failed")
                ticket.give(RequestFailed(why))

    def _refuse(self, new: list[Ticket]) -> None:
        for ticket in new:
            if ticket.accepted.set_running_or_notify_cancel():
                ticket.accepted.set_exception(NotServing("the server is shutting down"))
        for ticket in list(self._running.values()):
            self._forget(ticket, "failed")
            ticket.give(NotServing("the server is shutting down"))
