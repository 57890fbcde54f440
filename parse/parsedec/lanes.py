"""Where judge passes run while a draft is written (`streamed`): while the draft model pauses, or beside it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from contextvars import copy_context
from functools import cache
from types import TracebackType
from typing import Protocol, Self

import torch

from parsedec.static.graphs import own_stream


class Lane(Protocol):
    """Runs judge passes while a draft is written: one at a time, in the order they were submitted."""

    def submit(self, judge_pass: Callable[[], None]) -> None: ...

    def waits(self) -> bool:
        """Whether the draft model has to wait for the judge now."""

    def wait(self) -> None:
        """Wait until all passes are done; raises what one of them raised."""

    def drafting(self) -> AbstractContextManager[None]:
        """The context in which the draft model has to run."""

    @property
    def in_turn(self) -> bool:
        """Whether the draft model pauses while a pass runs."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Drop the passes that have not begun; none runs after this returns."""


class InTurn:
    """The draft model pauses while the judge works, which suits a CPU best."""

    in_turn = True

    def __init__(self) -> None:
        self._passes: list[Callable[[], None]] = []

    def submit(self, judge_pass: Callable[[], None]) -> None:
        self._passes.append(judge_pass)

    def waits(self) -> bool:
        return bool(self._passes)

    def wait(self) -> None:
        while self._passes:
            self._passes.pop(0)()

    def drafting(self) -> AbstractContextManager[None]:
        return nullcontext()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._passes.clear()


class Beside:
    """The judge works in a thread of its own, and on CUDA the draft model on a stream of its own.

    The draft model is the one that moves to another stream, because its session is made there and never leaves it. The
    target's cache was begun on the caller's stream, and the allocator reuses memory that one stream has freed, even if
    another still reads it. The streams wait for each other only at the beginning and at the end; in between, the passes
    run on the caller's.
    """

    in_turn = False

    def __init__(self, target: torch.device, draft: torch.device) -> None:
        self._streams = torch.cuda.current_stream(target) if target.type == "cuda" else None
        self._callers = torch.cuda.current_stream(draft) if draft.type == "cuda" else None
        self._own = _draft_stream(draft) if draft.type == "cuda" else None
        self._pool = ThreadPoolExecutor(1, "parsedec-judge")
        self._passes: list[Future[None]] = []

    def submit(self, judge_pass: Callable[[], None]) -> None:
        # in the caller's context, so that a pass stops once its answer is no longer wanted (`wanted`)
        self._passes.append(self._pool.submit(copy_context().run, self._run, judge_pass))

    def waits(self) -> bool:
        return any(judge_pass.done() and judge_pass.exception() for judge_pass in self._passes)

    def wait(self) -> None:
        while self._passes:
            self._passes.pop(0).result()

    def drafting(self) -> AbstractContextManager[None]:
        return torch.cuda.stream(self._own) if self._own is not None else nullcontext()

    def __enter__(self) -> Self:
        if self._own is not None and self._callers is not None:
            self._own.wait_stream(self._callers)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        if self._own is not None and self._callers is not None:
            self._callers.wait_stream(self._own)

    def _run(self, judge_pass: Callable[[], None]) -> None:
        with torch.cuda.stream(self._streams) if self._streams is not None else nullcontext():
            judge_pass()


@cache
def _draft_stream(device: torch.device) -> torch.cuda.Stream:
    """One stream for all requests, so that memory freed by a draft model's session is only reused by draft models."""
    return own_stream(device)
