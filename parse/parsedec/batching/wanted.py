"""Whether the answer that is being written is still wanted. Long computations look here, and end if it is not.

The reader of a stream can end it between two pieces; but a draft is written and judged before there is a first piece.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from threading import Event

_left: ContextVar[Event | None] = ContextVar("left", default=None)


class Unwanted(BaseException):
    """Raised in the thread that writes an answer nobody waits for any more. No `except Exception` stops it."""


@contextmanager
def unless(left: Event) -> Iterator[None]:
    """Have the body, in this thread, end by Unwanted soon after `left` is set."""
    token = _left.set(left)
    try:
        yield
    finally:
        _left.reset(token)


def can_end() -> bool:
    """Whether there is anybody who may say that this answer is no longer wanted."""
    return _left.get() is not None


def check() -> None:
    """Raise Unwanted if the answer is no longer wanted."""
    left = _left.get()
    if left is not None and left.is_set():
        raise Unwanted


def pause(seconds: float) -> None:
    """Sleep. Raises Unwanted as soon as the answer is no longer wanted."""
    left = _left.get()
    if left is None:
        time.sleep(seconds)
    elif left.wait(seconds):
        raise Unwanted
