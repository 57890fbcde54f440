"""Waiting for a server's bytes, but only as long as the answer they belong to is wanted.

A server that hangs sends nothing, so a check between two pieces would only be reached after the time-out. httpx has no
setting for this: the network below it (httpcore's) is wrapped, and waits in short slices.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from parsedec.batching import wanted

if TYPE_CHECKING:
    import httpx

SLICE_S = 0.1


def wait_only_if_wanted(client: httpx.Client) -> None:
    """Have reads of this client end by `wanted.Unwanted`, which closes the connection. An httpx with other internals is
    left as it is: its reads end by their time-out."""
    transports = [getattr(client, "_transport", None), *getattr(client, "_mounts", {}).values()]  # those for proxies
    for pool in (getattr(transport, "_pool", None) for transport in transports):
        if pool is not None and hasattr(pool, "_network_backend"):
            pool._network_backend = _Network(pool._network_backend)


class _Wrapped:
    """An object of httpcore's, except for what is overridden here."""

    def __init__(self, made: Any) -> None:
        self._made = made

    def __getattr__(self, name: str) -> Any:
        return getattr(self._made, name)


class _Network(_Wrapped):
    def connect_tcp(self, *args: Any, **options: Any) -> _Stream:
        return _Stream(self._made.connect_tcp(*args, **options))


class _Stream(_Wrapped):
    def start_tls(self, *args: Any, **options: Any) -> _Stream:
        return _Stream(self._made.start_tls(*args, **options))

    def read(self, max_bytes: int, timeout: float | None = None) -> Any:
        """Read up to `max_bytes`. No bytes are lost by a slice of time in which none arrive."""
        import httpcore

        if timeout is None or not wanted.can_end():
            return self._made.read(max_bytes, timeout)
        until = time.monotonic() + timeout
        while True:
            wanted.check()
            left = max(0.001, until - time.monotonic())
            try:
                return self._made.read(max_bytes, min(left, SLICE_S))
            except httpcore.ReadTimeout:
                if left <= SLICE_S:
                    raise
