"""Whether the answer that is being written is still wanted. What takes long looks here, and ends where it is not.

Between two pieces of an answer its reader can end it; but a draft is written and judged before there is a piece.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from threading import Event

_left: ContextVar[Event | None] = ContextVar("left", default=None)


class Unwanted(BaseException):
    """Raised where an answer is being written that nobody waits for any more. No `except Exception` stops it."""


@contextmanager
def unless(left: Event) -> Iterator[None]:
    """What is done inside, in this thread, ends by Unwanted soon after `left` is set."""
    token = _left.set(left)
    try:
        yield
    finally:
        _left.reset(token)


def can_end() -> bool:
    """Whether anybody may say that this answer is not wanted any more."""
    return _left.get() is not None


def check() -> None:
    """Raise Unwanted where the answer is not wanted any more."""
    left = _left.get()
    if left is not None and left.is_set():
        raise Unwanted


def pause(seconds: float) -> None:
    """Sleep; raises Unwanted as soon as the answer is not wanted any more."""
    left = _left.get()
    if left is None:
        time.sleep(seconds)
    elif left.wait(seconds):
        raise Unwanted
