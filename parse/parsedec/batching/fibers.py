"""Requests that pause whenever they need a pass, so that the passes of several can be made together.

Each request runs the ordinary code - outer level, speculator, session - in a thread of its own. Only one of the threads
runs at a time, until it asks for a pass or ends. So they take turns like coroutines, in a fixed order, and nothing that
they share needs a lock. With Python's own coroutines, every function on the way would have to be `async`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, Generic, TypeVar

T = TypeVar("T")

_here = threading.local()


class Closed(BaseException):
    """Raised in a paused fiber that is closed. No `except Exception` stops it."""


class Fiber(Generic[T]):
    """`body` in a thread of its own.

    question  what it waits for; None before it is started and after it has ended
    asked     how many questions it has asked
    waited    forwards made for others since it asked its question
    spent     seconds it has run, plus those that `charge` added: its share of the passes made for it
    """

    def __init__(self, body: Callable[[], T]) -> None:
        self.question: Any = None
        self.asked = self.waited = 0
        self.spent = 0.0
        self._body = body
        self._answer: Any = None
        self._failure: Exception | None = None
        self._result: list[T] = []
        self._error: BaseException | None = None
        self._since = 0.0
        self._running = self._closed = False
        self._go, self._paused = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, daemon=True)

    @property
    def ended(self) -> bool:
        return bool(self._result) or self._error is not None

    @property
    def result(self) -> T:
        """What the body returned; raises what it raised."""
        if self._error is not None:
            raise self._error
        return self._result[0]

    def resume(self, answer: Any = None) -> None:
        """Let it run on, with the answer to its question, until it asks again or ends."""
        self._answer = answer
        self._since = time.perf_counter()
        if self._thread.ident is None:
            self._thread.start()  # raises if there can be no more threads: nothing runs then that could be waited for
        else:
            self._go.release()
        self._running = True
        self._wait()
        self.spent += time.perf_counter() - self._since

    def fail(self, error: Exception) -> None:
        """As `resume`, but its question raises `error` instead of being answered."""
        self._failure = error
        self.resume()

    def charge(self, seconds: float) -> None:
        self.spent += seconds

    def seconds(self) -> float:
        """`spent` up to now; to be called by the body."""
        return self.spent + time.perf_counter() - self._since

    def ask(self, question: Any) -> Any:
        """Pause until there is an answer; to be called by the body. Raises Closed if the fiber is closed instead."""
        if self._closed:  # asked by a `finally` clause while the fiber is being closed: nobody would answer
            raise Closed
        self.question = question
        self.asked += 1
        self._paused.release()
        self._go.acquire()
        if self._closed:
            raise Closed
        self.question, self.waited = None, 0
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure
        answer, self._answer = self._answer, None
        return answer

    def close(self) -> None:
        """End it where it is. Its `finally` clauses run, but get no answers."""
        self._closed = True
        if self._running:  # its `resume` was interrupted: let it reach its next question
            self._wait()
        if self._thread.ident is not None and not self.ended:
            self._go.release()
            self._thread.join()

    def _wait(self) -> None:
        self._paused.acquire()
        self._running = False

    def _run(self) -> None:
        _here.fiber = self
        try:
            self._result.append(self._body())
        except Closed as closed:
            self._error = closed.with_traceback(None)  # the frames of a traceback hold the request's caches
        except BaseException as error:  # noqa: BLE001 - `result` raises it
            self._error = error
        finally:
            self.question = None
            self._paused.release()


def current() -> Fiber[Any] | None:
    """The fiber this code runs in, if any."""
    return getattr(_here, "fiber", None)


def clock() -> Callable[[], float]:
    """What tells the seconds that this request has taken: the real clock, or in a fiber what it has spent."""
    fiber = current()
    return time.perf_counter if fiber is None else fiber.seconds
