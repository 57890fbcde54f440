"""What every request passes before it reaches a route: checks of its key and the size of its body; statuses counted.

Plain ASGI, not a framework's middleware: a stream must not be buffered, and must learn that its reader is gone.
"""

from __future__ import annotations

import hmac
import json
import logging
from collections.abc import Sequence

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from parsedec.serve.metrics import Metrics
from parsedec.serve.refusals import INTERNAL, Refusal

log = logging.getLogger(__name__)
OPEN = ("/", "/health")  # without a key
ROUTES = ("/", "/health", "/metrics", "/v1/chat/completions", "/v1/completions", "/v1/models")
SWALLOWED = 32_000_000  # bytes of a body beyond the limit that are read and dropped, so that the answer arrives


class Guard:
    """keys   a request must carry one of them; if there are none, everyone may come in
    limit  most bytes of a body"""

    def __init__(self, app: ASGIApp, *, keys: Sequence[str], limit: int, metrics: Metrics) -> None:
        self.app, self.limit, self.metrics = app, limit, metrics
        self.keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        began = False

        async def counted(message: Message) -> None:
            nonlocal began
            if message["type"] == "http.response.start":
                began = True
                path = scope["path"] if scope["path"] in ROUTES else "other"
                self.metrics.requests.labels(path, str(message["status"])).inc()
            await send(message)

        try:
            self._check_key(scope)
            body = await self._body(scope, receive)
            return await self.app(scope, _again(body, receive), counted)
        except Refusal as refused:
            await _answer(refused, counted)
        except Exception:
            log.exception("%s %s failed", scope["method"], scope["path"])
            if not began:
                await _answer(Refusal(500, INTERNAL, code="internal_error"), counted)

    def _check_key(self, scope: Scope) -> None:
        """Raise Refusal for a wrong key. The time it takes does not depend on how much of a key is right."""
        if not self.keys or scope["path"] in OPEN:
            return
        sent = dict(scope["headers"]).get(b"authorization", b"")
        scheme, _, given = sent.partition(b" ")
        right = [hmac.compare_digest(given.strip(), key) for key in self.keys]
        if scheme.lower() != b"bearer" or not any(right):
            raise Refusal(
                401,
                "the API key is missing or wrong; expected 'Authorization: Bearer KEY'.",
                code="invalid_api_key",
            )
        scope["parsedec.client"] = f"key {right.index(True)}"

    async def _body(self, scope: Scope, receive: Receive) -> bytes | None:
        """The whole body; None if the client went away. Raises Refusal, 413, for one that is too long."""
        chunks, size = list[bytes](), 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            chunk = message.get("body", b"")
            size += len(chunk)
            if size <= self.limit:
                chunks.append(chunk)
            else:
                chunks.clear()
            if not message.get("more_body", False) or size > self.limit + SWALLOWED:
                break
        if size > self.limit:
            raise Refusal(
                413,
                f"the request's body has {size} bytes or more; expected at most {self.limit}.",
                code="request_too_large",
            )
        return b"".join(chunks)


def _again(body: bytes | None, receive: Receive) -> Receive:
    """`receive` from the start, with the body that was read already."""
    told = False

    async def first() -> Message:
        nonlocal told
        if told:
            return await receive()
        told = True
        if body is None:
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": body, "more_body": False}

    return first


async def _answer(refused: Refusal, send: Send) -> None:
    body = json.dumps(refused.body).encode()
    headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), **refused.headers}
    raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": refused.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})
