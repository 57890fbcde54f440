"""HTTP to one model server: time-outs, a deadline, retries with back-off, bounded connections, streamed events.

Completions are stateless, so asking again is harmless: what failed on the way is simply asked for once more.
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
LONGEST_ASKED_S = 30.0  # the same, where the server names its time; for more it is not waited
BUSY = {408, 409, 425, 429}  # refusals that pass by themselves


@dataclass(frozen=True, slots=True, kw_only=True)
class Connection:
    """How a server is reached.

    url                where it listens; with or without /v1 at the end
    api_key            sent as a bearer token; None: none is sent
    connect_timeout_s  seconds until a connection stands
    read_timeout_s     seconds without a byte, so also the longest prefill in a queue
    request_timeout_s  seconds for a whole answer, however steadily it drips
    retries            further attempts after one that failed on the way or found the server busy
    backoff_s          seconds before the first of them; doubled before each further one
    cooldown_s         seconds for which a lost draft server is not asked again
    max_connections    at the same time, over all requests of this process
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
    """One endpoint. Safe to use from several threads."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.url = connection.url.rstrip("/").removesuffix("/v1")
        self._client = _client(connection)
        self._lost_until = 0.0

    def get(self, path: str) -> Any:
        """JSON of a page."""
        return self.again(lambda: self._read("GET", path, None))

    def post(self, path: str, body: Mapping[str, Any], read: Callable[[Any], T]) -> T:
        """What `read` makes of the JSON of an answer; if it cannot make anything of it, the server is asked again, too.

        Raises ServerRefused where asking again would not help, else ServerError.
        """

        def attempt() -> T:
            answer = self._read("POST", path, body)
            with reading(answer):
                return read(answer)

        return self.again(attempt)

    def events(self, path: str, body: Mapping[str, Any], read: Callable[[Any], T]) -> Iterator[T]:
        """What `read` makes of each server-sent event of a streamed answer, as they come; one attempt. Closing it hangs
        up, and servers stop working for a client that has gone."""
        with self._open("POST", path, body) as parts:
            for line in _lines(parts):
                data = line.removeprefix(b"data:").strip()
                if not line.startswith(b"data:") or not data:
                    continue
                if data == b"[DONE]":
                    return
                event = _json(data, self.url)
                with reading(event):
                    if event.get("error"):  # null stands beside what is well
                        raise _broken_off(self.url, event["error"])
                    found = read(event)
                yield found
            raise ServerError(f"{self.url} closed a stream before its end ([DONE]).")

    def again(self, attempt: Callable[[], T]) -> T:
        """The result of `attempt`, tried as often as the connection allows."""
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
        """Seconds until the server is asked again: the next of `waits`, or what it asks for if that is more. None: it
        is not asked again, since it refused, has failed too often or wants more than `longest_s`."""
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
        """Whether it was lost a short time ago, so that asking would only cost time."""
        return time.monotonic() < self._lost_until

    def note_lost(self) -> None:
        self._lost_until = time.monotonic() + self.connection.cooldown_s

    def close(self) -> None:
        """Give back the connections."""
        self._client.close()

    def _read(self, method: str, path: str, body: Mapping[str, Any] | None) -> Any:
        with self._open(method, path, body) as parts:
            return _json(b"".join(parts), self.url)

    @contextmanager
    def _open(self, method: str, path: str, body: Mapping[str, Any] | None) -> Iterator[Iterator[bytes]]:
        """The bytes of an answer that has begun well."""
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
        """The bytes of an answer as they come; raises ServerError for those that come after `end`."""
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
    """The certificates that are trusted, read once for all servers."""
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
    """What a Retry-After says: seconds, or a date."""
    if retry_after is None:
        return None
    if re.fullmatch(r"[0-9]+(\.[0-9]+)?", retry_after):
        return float(retry_after)
    try:
        return max(0.0, parsedate_to_datetime(retry_after).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None


def _said(text: str) -> str:
    """What a server says of an error: the message in its JSON, where it has one."""
    try:
        told = json.loads(text)
    except ValueError:
        told = text
    for name in ("error", "message", "detail"):  # {"error": {"message": …}}, as OpenAI; {"detail": …}, as FastAPI
        told = told.get(name, told) if isinstance(told, dict) else told
    return " ".join(str(told).split())[:300]


def _broken_off(url: str, error: object) -> ServerError:
    """An error in a stream that had begun. Some servers say there, and not by the status, that they refuse."""
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
    """An answer in another layout than it should have is the server's fault, and is said to be."""
    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
        raise ServerError(
            f"a server's answer is laid out in a way that is not known here ({error!r}): {str(what)[:200]}."
        ) from error


_servers: dict[Connection, Server] = {}
_lock = threading.Lock()


def server_of(connection: Connection) -> Server:
    """The server of a connection: one for the process, so that its limit on connections holds."""
    with _lock:
        if connection not in _servers:
            _servers[connection] = Server(connection)
        return _servers[connection]
