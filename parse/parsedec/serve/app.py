"""The routes: OpenAI's chat and text completions over an engine, its models list, health, metrics, and a chat page."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from parsedec.models.language_model import LanguageModel
from parsedec.serve.asked import Asked, ChatAsked, Defaults, TextAsked, tasks_of
from parsedec.serve.desk import Desk, Engine, Ticket
from parsedec.serve.guard import Guard
from parsedec.serve.jobs import Event
from parsedec.serve.logprobs import Book
from parsedec.serve.metrics import Metrics
from parsedec.serve.refusals import Refusal, refusal
from parsedec.serve.replies import DONE, Reply, event
from parsedec.serve.settings import ServeSettings
from parsedec.text.chat import shows_role
from parsedec.types import Limits, Result, Sampling

T = TypeVar("T")
PAGE = Path(__file__).with_name("page.html")
PAGE_HEADERS = {  # one file that talks to its own server and to nothing else
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
GRACE_S = 0.5  # a stream begins after it, whether or not there is text yet
TAKEN = ": the request was taken\n\n"  # a comment, if there is no chunk that can say it
LEFT = 499  # read by nobody: what proxies log for a client that went away


class Gateway:
    """An engine behind OpenAI's interface; `app` is what an ASGI server runs.

    limits, sampling  defaults for what a request leaves out
    fingerprint       `system_fingerprint` of the answers: the same as long as the configuration is the same
    """

    def __init__(
        self,
        engine: Engine,
        settings: ServeSettings,
        *,
        limits: Limits | None = None,
        sampling: Sampling | None = None,
        fingerprint: str = "",
    ) -> None:
        self.settings = settings
        self.model = settings.model or str(getattr(getattr(engine, "target", None), "name", "parsedec"))
        self.metrics = Metrics()
        self.defaults = Defaults(
            limits=limits or Limits(),
            sampling=sampling or Sampling(),
            max_tokens=settings.max_tokens,
            max_choices=settings.max_choices,
            no_logprobs=getattr(engine, "no_logprobs", "its engine knows none"),
        )
        self._speaks: LanguageModel | None = getattr(engine, "target", None)
        self.fingerprint = fingerprint
        self.created = int(time.time())
        keys = settings.keys
        self.desk = Desk(
            engine, at_once=settings.at_once, queue=settings.queue, run=settings.run, on_end=self.metrics.count
        )
        self.metrics.running.set_function(lambda: self.desk.running)
        self.metrics.waiting.set_function(lambda: self.desk.waiting)
        self.app = Guard(self._routes(), keys=keys, limit=settings.max_request_bytes, metrics=self.metrics)

    def _routes(self) -> FastAPI:
        app = FastAPI(title="parsedec", docs_url=None, redoc_url=None)  # those pages load from elsewhere
        app.add_exception_handler(Refusal, _refused)
        app.add_exception_handler(RequestValidationError, _invalid)
        app.add_exception_handler(HTTPException, _no_route)
        get, post = {"methods": ["GET"]}, {"methods": ["POST"], "response_model": None}
        app.add_api_route("/v1/chat/completions", self.chat, **post)  # type: ignore[arg-type]
        app.add_api_route("/v1/completions", self.complete, **post)  # type: ignore[arg-type]
        app.add_api_route("/v1/models", self.models, **get)  # type: ignore[arg-type]
        app.add_api_route("/v1/models/{name:path}", self.one_model, **get)  # type: ignore[arg-type]
        app.add_api_route("/health", self.health, **get)  # type: ignore[arg-type]
        app.add_api_route("/metrics", self.read_metrics, **get)  # type: ignore[arg-type]
        app.add_api_route("/", self.page, **get, include_in_schema=False)  # type: ignore[arg-type]
        return app

    async def chat(self, request: Request, asked: ChatAsked) -> Response:
        if any(turn.role == "tool" for turn in asked.messages) and not self._shows_tools:
            raise Refusal(
                400,
                "a message has the role 'tool', which the chat template of this model does not show. Put what the tool "
                "said into a message of the user's.",
                code="invalid_value",
                param="messages",
            )
        return await self._answer(request, asked, chat=True)

    async def complete(self, request: Request, asked: TextAsked) -> Response:
        return await self._answer(request, asked, chat=False)

    async def models(self) -> dict[str, Any]:
        return {"object": "list", "data": [self._model()]}

    async def one_model(self, name: str) -> dict[str, Any]:
        self._check_model(name)
        return self._model()

    async def health(self) -> Response:
        if self.desk.closed or not self.desk.alive:
            return JSONResponse({"status": "closing"}, 503)
        return JSONResponse({"status": "ok", "running": self.desk.running, "waiting": self.desk.waiting})

    async def read_metrics(self) -> Response:
        return Response(self.metrics.page(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def page(self) -> Response:
        return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers=PAGE_HEADERS)

    def _model(self) -> dict[str, Any]:
        model = {"id": self.model, "object": "model", "created": self.created, "owned_by": "parsedec"}
        return model | ({"max_model_len": self._speaks.context_limit} if self._speaks else {})

    @cached_property
    def _shows_tools(self) -> bool:
        return self._speaks is None or shows_role(self._speaks, "tool")

    def _check_model(self, name: str) -> None:
        if name != self.model:
            raise Refusal(
                404,
                f"the model '{name[:200]}' does not exist; this server has '{self.model}'.",
                code="model_not_found",
                param="model",
            )

    async def _answer(self, request: Request, asked: Asked, *, chat: bool) -> Response:
        self._check_model(asked.model)
        tasks = tasks_of(asked, self.defaults)
        prompts = len(tasks) // (asked.n or 1)
        client = _client(request)
        try:
            tasks = await self.desk.read(tasks, client)
        except Refusal as refused:
            if refused.status == 400 and refused.param is None:  # all else in the request was right
                refused.param = "messages" if chat else "prompt"
            raise
        ticket = self.desk.submit(tasks, client)
        book = Book(self._speaks) if self._speaks and tasks[0].top is not None else None
        reply = Reply(chat=chat, model=self.model, fingerprint=self.fingerprint, book=book)
        with ExitStack() as dropping:
            dropping.callback(ticket.drop)
            if not asked.stream:
                results = await _unless_gone(request, _collected(ticket, reply))
                if results is None:
                    return Response(status_code=LEFT)
                return JSONResponse(reply.whole(results, prompts))
            # what goes wrong soon can still be told by the status
            first = await _unless_gone(request, _soon(ticket))
            if first is None:
                return Response(status_code=LEFT)
            for _, told in first:
                if isinstance(told, Exception):
                    raise refusal(told)
            counted = asked.stream_options is not None and bool(asked.stream_options.include_usage)
            pieces = _events(ticket, reply, first, prompts if counted else None)
            return EventStream(pieces, dropping.pop_all())


class EventStream(StreamingResponse):
    """Server-sent events. `closing` is closed when the reader has gone or everything is sent."""

    def __init__(self, pieces: AsyncIterator[str], closing: ExitStack) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(pieces, media_type="text/event-stream", headers=headers)
        self.closing = closing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self.closing:
            await super().__call__(scope, receive, send)


async def _collected(ticket: Ticket, reply: Reply) -> list[Result]:
    """The results of all choices, in order. Raises Refusal for the first error."""
    results: dict[int, Result] = {}
    while len(results) < len(ticket.jobs):
        index, told = await ticket.next()
        if isinstance(told, Exception):
            raise refusal(told)
        reply.note(index, told)
        if told.result is not None:
            results[index] = told.result
    return [results[i] for i in sorted(results)]


async def _soon(ticket: Ticket) -> list[tuple[int, Event]]:
    """The first event, if there is one within GRACE_S."""
    try:
        return [await asyncio.wait_for(ticket.next(), GRACE_S)]
    except TimeoutError:
        return []


async def _events(
    ticket: Ticket, reply: Reply, first: list[tuple[int, Event]], usage: int | None
) -> AsyncIterator[str]:
    """The stream: the chunks of each choice, and at the end, if asked for, `usage` for so many prompts."""
    results: dict[int, Result] = {}
    opened: set[int] = set()
    if not first:  # the reader is told that its request was taken
        opened = {job.task.choice for job in ticket.jobs}
        openings = [opening for index in sorted(opened) if (opening := reply.first(index))]
        yield "".join(map(event, openings)) or TAKEN
    index, told = first[0] if first else await ticket.next()
    while not isinstance(told, Exception):
        opening = reply.first(index) if index not in opened else None
        opened.add(index)
        if opening:
            yield event(opening)
        reply.note(index, told)
        if told.text:
            yield event(reply.piece(index, told))
        if told.result is not None:
            results[index] = told.result
            yield event(reply.last(index, told.result))
        if len(results) == len(ticket.jobs):
            if usage is not None:
                yield event(reply.total([results[i] for i in sorted(results)], usage))
            break
        index, told = await ticket.next()
    else:
        yield event(refusal(told).body)  # the answer is not whole, and its reader is told so
    yield DONE


async def _unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T | None:
    """The result of `work`; None if the client goes away first."""
    working, leaving = asyncio.create_task(work), asyncio.create_task(_gone(request))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        working.cancel()
        leaving.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _client(request: Request) -> str:
    """Who a request counts for in the queue: its key or, without keys, its address."""
    known: str | None = request.scope.get("parsedec.client")
    return known or (request.client.host if request.client else "")


async def _refused(_: Request, error: Exception) -> Response:
    refused = refusal(error)
    return JSONResponse(refused.body, refused.status, headers=refused.headers)


async def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    wrong = error.errors()[0]
    # pydantic adds the names of its own validators to the path, which is to lead to what the client sent
    where = [str(part) for part in wrong["loc"][1:] if isinstance(part, int) or part.isidentifier()]
    kind = request.headers.get("content-type", "")
    if "json" not in kind and wrong["loc"] == ("body",):  # it was not read at all
        said = f"the header Content-Type is '{kind[:100]}'; expected application/json."
        return await _refused(request, Refusal(400, said, code="invalid_content_type"))
    if wrong["type"] == "json_invalid":
        said = f"the body is no JSON: {wrong.get('ctx', {}).get('error', wrong['msg'])}."
        return await _refused(request, Refusal(400, said, code="invalid_json"))
    said = f"'{'.'.join(where) or 'body'}' is not what it should be: {wrong['msg'].lower()}."
    return await _refused(request, Refusal(400, said, code="invalid_value", param=where[0] if where else None))


async def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    said = f"{request.method} {request.url.path[:200]}: {error.detail}."
    code = {404: "unknown_url", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
    allow = (error.headers or {}).get("Allow")
    return await _refused(request, Refusal(error.status_code, said, code=code, allow=allow))
