"""An HTTP server with OpenAI's interface over one engine.

Routes: /v1/completions, /v1/chat/completions, /v1/models, /health, /metrics.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from photon_train.errors import PhotonError
from photon_train.inference.answers import ERRORS, ChatStyle, Choice, Echo, Style, error_body, usage
from photon_train.inference.engine import Engine, Prompt
from photon_train.inference.metrics import CONTENT_TYPE
from photon_train.inference.openai import ChatRequest, CompletionRequest
from photon_train.inference.refusals import describe
from photon_train.inference.request import Event, SamplingParams
from photon_train.inference.tokens import TokenWriter
from photon_train.inference.worker import RETRY_AFTER_S, Busy, NotServing, RequestFailed, Ticket, Worker

CLIENT_POLL_S = 0.2  # how often a waiting request looks whether its client is still there


class Answer:
    """Several prompts with the same settings, answered together.

    Args:
        worker: The engine's thread.
        prompts: Token ids of each.
        params: For each of them.
        style: How the answer is written.
        model: The name it is given under.
        keep: Continuations per prompt that are given, the best by mean log-probability; None: all, in order.
    """

    def __init__(
        self,
        worker: Worker,
        prompts: list[list[int]],
        params: SamplingParams,
        style: Style,
        model: str,
        keep: int | None = None,
    ) -> None:
        self.worker, self.prompts, self.params = worker, prompts, params
        self.style, self.keep = style, keep
        self.tickets: list[Ticket] = []
        self.completion_tokens = 0
        self.head = {"id": f"{style.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    async def begin(self) -> None:
        """Queue every prompt, or none.

        Raises:
            PhotonError: if one is refused.
        """
        self.tickets = await self.worker.submit(self.prompts, self.params)
        self.worker.metrics.prompt_tokens += sum(map(len, self.prompts))

    def end(self) -> None:
        """Whatever still runs is dropped."""
        for ticket in self.tickets:
            self.worker.drop(ticket)

    async def whole(self) -> dict[str, Any]:
        """The answer once everything is there."""
        try:
            choices = [choice for place in range(len(self.tickets)) for choice in await self._collect(place)]
        finally:
            self.end()
        written = [self.style.whole(choice) for choice in choices]
        return {**self.head, "object": self.style.object_name, "choices": written, "usage": self._usage()}

    async def _collect(self, place: int) -> list[Choice]:
        kept = self.keep or self.params.n
        choices = [Choice(index, place=place) for index in range(self.params.n)]
        async for event in self.tickets[place]:
            choices[event.index].events.append(event)
            self.completion_tokens += 1
        if kept < len(choices):
            choices = sorted(choices, key=lambda choice: -choice.mean_logprob)[:kept]
        return [replace(choice, index=place * kept + index) for index, choice in enumerate(choices)]

    async def stream(self, with_usage: bool) -> AsyncIterator[str]:
        """The answer as server-sent events."""
        head = {**self.head, "object": self.style.chunk_name}
        offsets: dict[int, int] = {}
        try:
            async for place, event in self._merged():
                self.completion_tokens += 1
                index = place * self.params.n + event.index
                opening = self.style.opening(index)
                if index not in offsets and opening:
                    yield _event({**head, "choices": [opening]})
                yield _event({**head, "choices": [self.style.piece(place, index, event, offsets.get(index))]})
                offsets.setdefault(index, self.style.echoed(place))
                offsets[index] += len(event.text)
            if with_usage:
                yield _event({**head, "choices": [], "usage": self._usage()})
            yield "data: [DONE]\n\n"
        except Exception as error:  # the answer has begun: all that is left is to say so in it
            yield _event(error_body(str(error), "server_error"))
        finally:
            self.end()

    async def _merged(self) -> AsyncIterator[tuple[int, Event]]:
        """The events of all prompts as they come."""
        queue: asyncio.Queue = asyncio.Queue()

        async def forward(place: int, ticket: Ticket) -> None:
            try:
                async for event in ticket:
                    queue.put_nowait((place, event))
                queue.put_nowait((place, None))
            except Exception as error:
                queue.put_nowait((place, error))

        tasks = [asyncio.create_task(forward(*numbered)) for numbered in enumerate(self.tickets)]
        try:
            left = len(tasks)
            while left:
                place, item = await queue.get()
                if isinstance(item, Exception):
                    raise item
                if item is None:
                    left -= 1
                else:
                    yield place, item
        finally:
            for task in tasks:
                task.cancel()

    def _usage(self) -> dict[str, int]:
        return usage(sum(map(len, self.prompts)), self.completion_tokens if self.style.with_answer else 0)


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


async def _unless_gone(request: Request, work: Any) -> Any:
    """The result of a coroutine; it is cancelled when the client goes away (then None)."""
    task = asyncio.ensure_future(work)
    try:
        while not task.done():
            await asyncio.wait([task], timeout=CLIENT_POLL_S)
            if not task.done() and await request.is_disconnected():
                return None
        return task.result()
    finally:
        task.cancel()


def create_app(engine: Engine, name: str, max_waiting: int = 1024, api_key: str | None = None) -> FastAPI:
    """The server's application; it starts and stops the engine's thread.

    Args:
        engine: With a tokenizer.
        name: Under which the model is listed.
        max_waiting: Continuations that wait for their turn at most; whoever comes then is told to try again.
        api_key: What clients of /v1 must send as their bearer token; None asks nobody.

    Raises:
        PhotonError: for a `max_waiting` below 1, or an empty key.
    """
    if api_key is not None and not api_key.strip():
        raise PhotonError("--api-key is empty: give a key, or leave it out to ask for none")
    worker, tokenizer, started = Worker(engine, max_waiting), engine.tokenizer, int(time.time())
    writer = TokenWriter(tokenizer)
    entry = {"id": name, "object": "model", "created": started, "owned_by": "photon-train"}
    entry["max_model_len"] = engine.longest

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        worker.start()
        try:
            yield
        finally:
            worker.stop()

    async def check_key(request: Request) -> None:
        if api_key is None:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        # In constant time: how long it takes tells nothing of the key.
        if not secrets.compare_digest(given.strip().encode(), api_key.encode()) or scheme.lower() != "bearer":
            message = "the API key is missing or wrong: send it as 'Authorization: Bearer KEY'"
            raise HTTPException(401, message, {"WWW-Authenticate": "Bearer"})

    keyed = [Depends(check_key)]
    app = FastAPI(title="photon-train", lifespan=lifespan, responses=ERRORS)
    app.state.worker = worker

    @app.exception_handler(PhotonError)
    async def refused(_: Request, error: PhotonError) -> JSONResponse:
        worker.metrics.requests["refused"] += 1
        if isinstance(error, Busy):
            headers = {"Retry-After": str(RETRY_AFTER_S)}
            return JSONResponse(error_body(str(error), "rate_limit_error"), 429, headers)
        if isinstance(error, NotServing):
            return JSONResponse(error_body(str(error), "server_error"), 503)
        return JSONResponse(error_body(str(error)), 400)

    @app.exception_handler(RequestFailed)
    async def unanswered(_: Request, error: RequestFailed) -> JSONResponse:
        return JSONResponse(error_body(str(error), "server_error"), 500)

    @app.exception_handler(RequestValidationError)
    async def malformed(_: Request, error: RequestValidationError) -> JSONResponse:
        worker.metrics.requests["refused"] += 1
        message, param = describe(error.errors())
        return JSONResponse(error_body(message, param=param), 400)

    @app.exception_handler(HTTPException)
    async def elsewhere(_: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse(error_body(str(error.detail)), error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> JSONResponse:
        return JSONResponse(error_body(str(error), "server_error"), 500)

    def check_model(asked: str | None) -> None:
        if asked not in (None, name):
            raise PhotonError(f"model {asked!r} is not served here: the model is {name!r}")

    def echo_of(prompt: Prompt, tokens: list[int]) -> Echo:
        text = prompt if isinstance(prompt, str) else tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
        return Echo(text, tokens)

    async def respond(request: Request, body: Any, answer: Callable[[], Answer]) -> Any:
        check_model(body.model)
        answering = answer()
        await answering.begin()
        if body.stream:
            with_usage = bool(body.stream_options and body.stream_options.include_usage)
            return StreamingResponse(answering.stream(with_usage), media_type="text/event-stream")
        return JSONResponse(await _unless_gone(request, answering.whole()))

    @app.get("/health")
    async def health() -> JSONResponse:
        state = {"status": "ok" if worker.is_healthy else "failed", "open_requests": worker.num_open}
        return JSONResponse(state, 200 if worker.is_healthy else 503)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        return Response(worker.metrics.render(engine, worker.num_open), media_type=CONTENT_TYPE)

    @app.get("/v1/models", dependencies=keyed)
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [entry]}

    @app.get("/v1/models/{asked:path}", dependencies=keyed)
    async def model(asked: str) -> Any:
        if asked == name:
            return entry
        message = f"model {asked!r} is not served here: the model is {name!r}"
        return JSONResponse(error_body(message, code="model_not_found"), 404)

    @app.post("/v1/completions", dependencies=keyed)
    async def completions(body: CompletionRequest, request: Request) -> Any:
        drawn = body.best_of or body.n
        if drawn < body.n or (drawn > body.n and body.stream):
            raise PhotonError("best_of must not be smaller than n, and more than n cannot be streamed")

        def answer() -> Answer:
            # For an echo alone a token is computed and not given.
            limit = max(1, body.max_tokens)
            params = body.sampling(limit, drawn, body.logprobs or 0, engine.defaults, body.scored)
            prompts = [engine.tokens(prompt) for prompt in body.prompts]
            echoes = [echo_of(*each) for each in zip(body.prompts, prompts, strict=True)] if body.echo else None
            style = Style(writer, body.logprobs, echoes, body.max_tokens > 0, body.prompt_logprobs is not None)
            return Answer(worker, prompts, params, style, name, body.n)

        return await respond(request, body, answer)

    @app.post("/v1/chat/completions", dependencies=keyed)
    async def chat(body: ChatRequest, request: Request) -> Any:
        def answer() -> Answer:
            prompt = body.tokens(tokenizer)
            if body.top_logprobs is not None and not body.logprobs:
                raise PhotonError("top_logprobs needs logprobs=true")
            limits = (body.max_completion_tokens, body.max_tokens, max(1, engine.longest - len(prompt)))
            limit = next(given for given in limits if given is not None)
            params = body.sampling(limit, body.n, body.top_logprobs or 0, engine.defaults)
            style = ChatStyle(writer, (body.top_logprobs or 0) if body.logprobs else None)
            return Answer(worker, [prompt], params, style, name)

        return await respond(request, body, answer)

    return app
