"""HTTP to one model server: time-outs, a deadline, retries with back-off, bounded connections, streamed events.

Completions are stateless, so a request that failed on the way can simply be repeated.
"""

from __future__ import annotations

import json
import logging
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

from parsedec.batching.wanted import pause
from parsedec.errors import ConfigError, ServerError, ServerRefused
from parsedec.remote.event_lines import EventLines
from parsedec.remote.network import wait_only_if_wanted

if TYPE_CHECKING:
    import ssl

    import httpx

log = logging.getLogger(__name__)
T = TypeVar("T")

LONGEST_WAIT_S = 8.0  # between two attempts
LONGEST_ASKED_S = 30.0  # the same, if the server names the time; a longer one is not waited for
BUSY = {408, 409, 425, 429}  # HTTP statuses of refusals that are only temporary


@dataclass(frozen=True, slots=True, kw_only=True)
class Connection:
    """How to reach a server.

    url                where it listens, with or without /v1 at the end
    api_key            sent as a bearer token; None: none is sent
    connect_timeout_s  most seconds until a connection is made
    read_timeout_s     most seconds without a byte, so also for waiting in a queue and the longest prefill
    request_timeout_s  most seconds for a whole answer, however steadily it arrives
    retries            further attempts after one that failed on the way or found the server busy
    backoff_s          seconds before the first of them; doubled before each further one
    cooldown_s         seconds for which a lost draft server is not asked again
    max_connections    open at the same time, for all requests of this process
    """

    url: str
    api_key: str | None = field(default=None, repr=False)
    connect_timeout_s: float = 5.0
    read_timeout_s: float = 120.0
    request_timeout_s: float = 1800.0
    retries: int = 3
    backoff_s: float = 0.25
    cooldown_s: float = 30.0
    max_connections: int = 16

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ConfigError(f"url='{self.url}' is no address of a server; expected http://HOST:PORT or https://….")
        limits = (self.connect_timeout_s, self.read_timeout_s, self.request_timeout_s)
        if min(limits) <= 0 or min(self.retries, self.backoff_s, self.cooldown_s) < 0 or self.max_connections < 1:
            raise ConfigError(
                f"connect_timeout_s, read_timeout_s, request_timeout_s={limits}, retries={self.retries}, "
                f"backoff_s={self.backoff_s}, cooldown_s={self.cooldown_s}, max_connections={self.max_connections}; "
                "expected time-outs above 0, at least one connection, and the others 0 or more."
            )


class Server:
    """One server. Safe to use from several threads."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.url = connection.url.rstrip("/").removesuffix("/v1")
        self._client = _client(connection)
        self._lost_until = 0.0

    def get(self, path: str) -> Any:
        """The JSON at a path."""
        return self.again(lambda: self._read("GET", path, None))

    def post(self, path: str, body: Mapping[str, Any], read: Callable[[Any], T]) -> T:
        """What `read` makes of an answer's JSON. The server is also asked again if `read` can make nothing of it.

        Raises ServerRefused if asking again would not help, else ServerError.
        """

        def attempt() -> T:
            answer = self._read("POST", path, body)
            with reading(answer):
                return read(answer)

        return self.again(attempt)

    def events(self, path: str, body: Mapping[str, Any], read: Callable[[Any], T]) -> Iterator[T]:
        """What `read` makes of each server-sent event of a streamed answer, as it arrives; a single attempt.

        To close the generator is to hang up, and servers stop working for a client that has gone.
        """
        with self._open("POST", path, body) as parts:
            for line in _lines(parts):
                data = line.removeprefix(b"data:").strip()
                if not line.startswith(b"data:") or not data:
                    continue
                if data == b"[DONE]":
                    return
                event = _json(data, self.url)
                with reading(event):
                    if event.get("error"):  # null where nothing is wrong
                        raise _broken_off(self.url, event["error"])
                    found = read(event)
                yield found
            raise ServerError(f"{self.url} closed a stream before its end ([DONE]).")

    def again(self, attempt: Callable[[], T]) -> T:
        """The result of `attempt`, which is repeated as often as the connection allows."""
        waits = self.waits()
        while True:
            try:
                return attempt()
            except ServerError as error:
                wait = self.wait_after(error, waits)
                if wait is None:
                    raise
                log.warning("%s; again in %.2g s", error, wait)
                pause(wait)

    def waits(self) -> Iterator[float]:
        """Seconds to wait before each further attempt."""
        for i in range(self.connection.retries):
            yield min(self.connection.backoff_s * 2**i, LONGEST_WAIT_S)

    def wait_after(
        self, error: ServerError, waits: Iterator[float], longest_s: float = LONGEST_ASKED_S
    ) -> float | None:
        """Seconds until the server is asked again: the next of `waits`, or those it asks for, if that is more.

        None: do not ask again, since it refused, has failed too often, or wants more than `longest_s`.
        """
        wait, asked = next(waits, None), error.retry_after_s or 0.0
        if (
            wait is None
            or isinstance(error, ServerRefused)
            or asked > min(longest_s, self.connection.request_timeout_s)
        ):
            return None
        return max(wait, asked)

    @property
    def resting(self) -> bool:
        """Whether it was lost so recently that asking it would only cost time."""
        return time.monotonic() < self._lost_until

    def note_lost(self) -> None:
        self._lost_until = time.monotonic() + self.connection.cooldown_s

    def close(self) -> None:
        """Close its connections."""
        self._client.close()

    def _read(self, method: str, path: str, body: Mapping[str, Any] | None) -> Any:
        with self._open(method, path, body) as parts:
            return _json(b"".join(parts), self.url)

    @contextmanager
    def _open(self, method: str, path: str, body: Mapping[str, Any] | None) -> Iterator[Iterator[bytes]]:
        """The bytes of an answer, once its status is good."""
        import httpx

        end = time.monotonic() + self.connection.request_timeout_s
        try:
            with self._client.stream(method, self.url + path, json=body) as response:
                parts = self._in_time(response, path, end)
                if response.status_code != 200:
                    said = b"".join(parts).decode(errors="replace")
                    raise _refusal(self.url + path, response.status_code, said, response.headers.get("Retry-After"))
                yield parts
        except httpx.HTTPError as error:
            what = f"{type(error).__name__}: {error}".rstrip(": ")
            raise ServerError(
                f"{self.url}{path} could not be read ({what}). Check that the server runs and its url; a slow one "
                "needs a higher read_timeout_s."
            ) from error

    def _in_time(self, response: httpx.Response, path: str, end: float) -> Iterator[bytes]:
        """The bytes of an answer as they arrive. Raises ServerError once `end` has passed."""
        for part in response.iter_bytes():
            if time.monotonic() > end:
                raise ServerError(
                    f"{self.url}{path} took longer than request_timeout_s={self.connection.request_timeout_s:g}. "
                    "Raise it, or lower max_new_tokens."
                )
            yield part


def _client(connection: Connection) -> httpx.Client:
    try:
        import httpx
    except ImportError as error:
        raise ConfigError("engine=openai needs the package httpx: pip install 'parsedec[server]'.") from error
    seconds = connection.read_timeout_s
    client = httpx.Client(
        headers={"Authorization": f"Bearer {connection.api_key}"} if connection.api_key else {},
        timeout=httpx.Timeout(seconds, connect=connection.connect_timeout_s, pool=seconds),
        limits=httpx.Limits(max_connections=connection.max_connections),
        verify=_trusted(),
    )
    wait_only_if_wanted(client)
    return client


@cache
def _trusted() -> ssl.SSLContext:
    """The trusted certificates, read once for all servers."""
    import httpx

    return httpx.create_ssl_context()


def _refusal(where: str, status: int, text: str, retry_after: str | None) -> ServerError:
    shown = _said(text)
    if status >= 500 or status in BUSY:
        wait = _seconds(retry_after)
        asked = f" (ask again in {round(wait, 1):g} s)" if wait else ""
        busy = ServerError(f"{where} answered {status}: {shown}{asked}.")
        busy.retry_after_s = wait
        return busy
    hint = " Check the key: api_key_env." if status in (401, 403) else ""
    return ServerRefused(f"{where} refused the request ({status}): {shown}.{hint}", status, shown)


def _seconds(retry_after: str | None) -> float | None:
    """The seconds that a Retry-After header names, directly or as a date."""
    if retry_after is None:
        return None
    if re.fullmatch(r"[0-9]+(\.[0-9]+)?", retry_after):
        return float(retry_after)
    try:
        return max(0.0, parsedate_to_datetime(retry_after).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None


def _said(text: str) -> str:
    """What a server says about an error: the message in its JSON, if there is one."""
    try:
        told = json.loads(text)
    except ValueError:
        told = text
    for name in ("error", "message", "detail"):  # {"error": {"message": …}}, as OpenAI; {"detail": …}, as FastAPI
        told = told.get(name, told) if isinstance(told, dict) else told
    return " ".join(str(told).split())[:300]


def _broken_off(url: str, error: object) -> ServerError:
    """An error in a stream that had begun, which is also where some servers say that they refuse."""
    status = error.get("code") if isinstance(error, dict) else None
    said = _said(json.dumps({"error": error}))
    if isinstance(status, int) and 400 <= status < 500 and status not in BUSY:
        return ServerRefused(f"{url} refused the request ({status}): {said}.", status, said)
    return ServerError(f"{url} broke off its answer: {said}.")


def _lines(parts: Iterable[bytes]) -> Iterator[bytes]:
    lines = EventLines()
    for part in parts:
        yield from lines.push(part)
    yield lines.rest()


def _json(data: bytes, url: str) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        shown = data[:200].decode(errors="replace")
        raise ServerError(f"{url} answered with something that is no JSON: {shown!r}.") from error


@contextmanager
def reading(what: object) -> Iterator[None]:
    """Raise ServerError where the body fails because an answer does not have the layout it should have."""
    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
        raise ServerError(
            f"a server's answer is laid out in a way that is not known here ({error!r}): {str(what)[:200]}."
        ) from error


_servers: dict[Connection, Server] = {}
_lock = threading.Lock()


def server_of(connection: Connection) -> Server:
    """The server of a connection, one for the whole process, so that the limit on connections holds."""
    with _lock:
        if connection not in _servers:
            _servers[connection] = Server(connection)
        return _servers[connection]
