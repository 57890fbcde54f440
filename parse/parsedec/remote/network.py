"""Waiting for a server's bytes, but no longer than the answer they are for is wanted.

A server that hangs sends nothing, so a look between two pieces would come only with the time-out. httpx has no setting
for that: the network below it (httpcore's) is wrapped, and waits in short slices.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from parsedec.batching import wanted

if TYPE_CHECKING:
    import httpx

SLICE_S = 0.1


def wait_only_if_wanted(client: httpx.Client) -> None:
    """Reads of this client end by `wanted.Unwanted`; the connection is then closed. With an httpx that keeps these
    elsewhere nothing is changed: reads then end with their time-out."""
    transports = [getattr(client, "_transport", None), *getattr(client, "_mounts", {}).values()]  # those for proxies
    for pool in (getattr(transport, "_pool", None) for transport in transports):
        if pool is not None and hasattr(pool, "_network_backend"):
            pool._network_backend = _Network(pool._network_backend)


class _Wrapped:
    """What httpcore made, but for what is defined here."""

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
        """Up to `max_bytes`; a slice that brings none loses none."""
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
