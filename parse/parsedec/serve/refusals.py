"""Errors as OpenAI's clients read them: a status and {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

from typing import Any

from parsedec.errors import ParsedecError

TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
INTERNAL = "The server failed on this request; its log says why. Other requests are not affected."
CLOSING = "The server is shutting down. Send the request to another one, or again later."


class Refusal(ParsedecError):
    """A request that is not served.

    status  of the HTTP answer
    code    OpenAI's short name of the error
    param   the request's field that is wrong
    retry   seconds after which it may be tried again
    """

    def __init__(
        self, status: int, message: str, *, code: str, param: str | None = None, retry: int | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param, self.retry = status, code, param, retry

    @property
    def body(self) -> dict[str, Any]:
        kind = TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        headers = {"Retry-After": str(self.retry)} if self.retry is not None else {}
        return headers | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})


def refusal(error: Exception) -> Refusal:
    """What a client is told of an error: all of one that is the request's, nothing of a defect."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, ParsedecError):
        return Refusal(400, str(error), code="invalid_request")
    return Refusal(500, INTERNAL, code="internal_error")


def closing() -> Refusal:
    return Refusal(503, CLOSING, code="shutting_down", retry=5)
