"""Errors as OpenAI's clients read them: a status and {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

from typing import Any

from parsedec.errors import ChatTemplateError, ParsedecError, PromptError, PromptTooLong, ServerError, ServerRefused

TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
INTERNAL = "The server failed on this request; its log says why. Other requests are not affected."
LOST = "A model server behind this one could not be reached, was busy, or broke off. Send the request again later."
DENIED = "A model server behind this one refuses the request. The log of this server says why."
GIVEN_UP = "The server failed on a pass that this request shared with others, and gave all of them up. Send it again."
CLOSING = "The server is shutting down. Send the request to another one, or again later."
UNWANTED = "A model server behind this one refuses the request: "
ASKED = (400, 413, 422)  # statuses that refuse the request itself; others (key, model, address) the operator must mend
RETRY_S = 5  # seconds after which a lost model server may be back
OWN = (PromptError, ChatTemplateError)  # errors that a client can mend, beside the wrong fields that `asked` names


class Refusal(ParsedecError):
    """A request that is not served.

    status  of the HTTP answer
    code    OpenAI's short name of the error
    param   the request's field that is wrong
    retry   seconds after which it may be tried again
    allow   the methods its address has
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        param: str | None = None,
        retry: int | None = None,
        allow: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param, self.retry, self.allow = status, code, param, retry, allow

    @property
    def body(self) -> dict[str, Any]:
        kind = TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        headers = {"Retry-After": str(self.retry)} if self.retry is not None else {}
        headers |= {"Allow": self.allow} if self.allow else {}
        return headers | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})


def refusal(error: Exception) -> Refusal:
    """What a client is told of an error.

    All of it, if it concerns the request. If a model server refuses the request itself, its words are passed on, since
    clients would repeat the request after a 502. Other messages hold addresses and settings of model servers: they are
    for the log only.
    """
    if isinstance(error, Refusal):
        return error
    if isinstance(error, PromptTooLong):
        return Refusal(400, str(error), code="context_length_exceeded")
    if isinstance(error, OWN):
        return Refusal(400, str(error), code="invalid_request")
    if isinstance(error, ServerRefused) and error.status in ASKED and error.said:
        return Refusal(400, UNWANTED + error.said, code="model_server_refused")
    if isinstance(error, ServerRefused):
        return Refusal(502, DENIED, code="model_server_refused")
    if isinstance(error, ServerError):
        return Refusal(503, LOST, code="model_server_lost", retry=RETRY_S)
    return Refusal(500, INTERNAL, code="internal_error")


def closing() -> Refusal:
    return Refusal(503, CLOSING, code="shutting_down", retry=5)


def given_up() -> Refusal:
    """For answers that shared a pass that failed: one of them made it fail, and the others did not."""
    return Refusal(503, GIVEN_UP, code="pass_failed", retry=1)
