"""The engine in a thread of its own, for a server whose requests arrive in an event loop."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from photon_train.errors import PhotonError
from photon_train.inference.engine import Engine, Prompt
from photon_train.inference.request import Event, SamplingParams

logger = logging.getLogger(__name__)


class RequestFailed(RuntimeError):
    """A request that was accepted has no answer, through no fault of its client."""


@dataclass(eq=False)
class Ticket:
    """One request on its way through the engine; iterating over it yields its events.

    Attributes:
        prompt, params: What is asked.
        loop: Event loop that waits for the answer.
        accepted: The number of the request, or why it was refused.
        events: What has come; an exception if the engine failed.
        open: Continuations that have not ended.
    """

    prompt: Prompt
    params: SamplingParams
    loop: asyncio.AbstractEventLoop
    accepted: Future = field(default_factory=Future)
    events: asyncio.Queue = field(default_factory=asyncio.Queue)
    open: int = 0

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
    """A thread that owns an engine: only it touches model and cache."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._wake = threading.Condition()
        self._new: deque[Ticket] = deque()
        self._dropped: deque[Ticket] = deque()
        self._running: dict[int, Ticket] = {}
        self._stopping = False
        self.failure: Exception | None = None
        self._thread = threading.Thread(target=self._work, name="photon-engine", daemon=True)

    def start(self) -> None:
        """Begin to serve."""
        self._thread.start()

    def stop(self) -> None:
        """End after the step that is being computed; unfinished requests fail."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join()

    @property
    def is_healthy(self) -> bool:
        """Whether requests are answered."""
        return self._thread.is_alive() and self.failure is None

    @property
    def num_open(self) -> int:
        """Requests that are not finished."""
        return len(self._running) + len(self._new)

    async def submit(self, prompts: Sequence[Prompt], params: SamplingParams) -> list[Ticket]:
        """Queue a request for each of `prompts`, or none; they reach the engine together.

        Raises:
            PhotonError: as `Engine.add`, or if the engine has failed.
        """
        loop = asyncio.get_running_loop()
        tickets = [Ticket(prompt, params, loop) for prompt in prompts]
        with self._wake:
            if not self.is_healthy:
                raise PhotonError(f"the engine does not run: {self.failure or 'it was stopped'}")
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
        while True:
            with self._wake:
                while not (self._new or self._dropped or self._stopping or self.engine.has_work):
                    self._wake.wait()
                new, dropped = list(self._new), list(self._dropped)
                self._new.clear()
                self._dropped.clear()
                stopping = self._stopping
            if stopping:
                self._fail(PhotonError("the server is shutting down"), new)
                return
            for ticket in new:
                self._accept(ticket)
            for ticket in dropped:
                self._forget(ticket)
            try:
                for event in self.engine.step():
                    self._pass_on(event)
            except Exception as error:  # whatever it is, no client may wait for ever
                logger.exception("the engine failed")
                with self._wake:
                    self.failure = error
                    new = list(self._new)
                self._fail(error, new)
                return

    def _accept(self, ticket: Ticket) -> None:
        if not ticket.accepted.set_running_or_notify_cancel():
            return  # its client went away before it was looked at
        try:
            number = self.engine.add(ticket.prompt, ticket.params)
        except Exception as error:
            ticket.accepted.set_exception(error)
            return
        ticket.open = ticket.params.n
        self._running[number] = ticket
        ticket.accepted.set_result(number)

    def _forget(self, ticket: Ticket) -> None:
        for number in [number for number, other in self._running.items() if other is ticket]:
            self.engine.abort(number)
            del self._running[number]

    def _pass_on(self, event: Event) -> None:
        ticket = self._running.get(event.request_id)
        if ticket is None:  # another of its continuations has failed in this step
            return
        if event.error is not None:
            ticket.give(RequestFailed(event.error))
            self._forget(ticket)
            return
        ticket.open -= event.finish_reason is not None
        if not ticket.open:
            self.engine.result(event.request_id)
            del self._running[event.request_id]
        ticket.give(event)

    def _fail(self, error: Exception, new: list[Ticket]) -> None:
        for ticket in new:
            if ticket.accepted.set_running_or_notify_cancel():
                ticket.accepted.set_exception(error)
        for ticket in self._running.values():
            ticket.give(error)
        self._running.clear()
