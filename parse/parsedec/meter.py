"""What one request takes: wall-clock by phase, and the counts its levels add to.

On CUDA every boundary of a phase synchronises, so a phase holds the work it started. Between the steps of one phase,
and where a reader takes its time, nothing is waited for: a session may have the device read on meanwhile.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Lock
from typing import TypeVar

import torch

from parsedec.types import Counters, PhaseTimes

T = TypeVar("T")

# Held while a device as a whole is waited for, and while a graph is captured: CUDA refuses the one during the other.
DEVICE_WIDE = Lock()


def wait_for(device: torch.device | int) -> None:
    """Until a CUDA device has done all it was asked for."""
    with DEVICE_WIDE:
        torch.cuda.synchronize(device)


@dataclass(slots=True)
class Tally:
    """Counts of one request while it runs; `Counters` is what is left of it."""

    judge_passes: int = 0
    judge_rows: int = 0
    draft_tokens: int = 0
    kept_draft_tokens: int = 0
    inner_steps: int = 0
    offered_by_depth: list[int] = field(default_factory=list)
    accepted_by_depth: list[int] = field(default_factory=list)

    def count_tree(self, depth: int, accepted: int) -> None:
        """A tree of `depth` levels below the root, `accepted` of which were right."""
        self.inner_steps += 1
        missing = depth - len(self.offered_by_depth)
        self.offered_by_depth.extend([0] * missing)
        self.accepted_by_depth.extend([0] * missing)
        for level in range(depth):
            self.offered_by_depth[level] += 1
            self.accepted_by_depth[level] += level < accepted

    def counters(self, **totals: int) -> Counters:
        """The finished counts, with the totals only the sessions know."""
        return Counters(
            judge_passes=self.judge_passes,
            judge_rows=self.judge_rows,
            draft_tokens=self.draft_tokens,
            kept_draft_tokens=self.kept_draft_tokens,
            inner_steps=self.inner_steps,
            offered_by_depth=tuple(self.offered_by_depth),
            accepted_by_depth=tuple(self.accepted_by_depth),
            **totals,
        )


class Meter:
    """Seconds spent in prefill, draft, judge and decode of one request.

    clock  whose seconds are counted; in a batch a request's own ones (`fibers`). Only the times to the first token and
           to the end are always plain time, others' turns included
    """

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.perf_counter) -> None:
        self._cuda = device.type == "cuda"
        self._clock = clock
        self._phases: dict[str, float] = defaultdict(float)
        self._start, self._began = self.now(), time.perf_counter()
        self._first_token: float | None = None

    def now(self) -> float:
        if self._cuda:
            for device in range(torch.cuda.device_count()):  # target and draft may be on different ones
                wait_for(device)
        return self._clock()

    @contextmanager
    def span(self, phase: str, settled: bool = True) -> Iterator[None]:
        """Count what is done inside; not `settled`: without waiting for what devices were asked for."""
        now = self.now if settled else self._clock
        start = now()
        try:
            yield
        finally:
            self._phases[phase] += now() - start

    def timed(self, steps: Iterator[T], phase: str) -> Iterator[T]:
        """Pass `steps` on, counting the time inside them but not what their reader does between."""
        since = self.now()
        try:
            for step in steps:
                self._phases[phase] += self._clock() - since
                try:
                    yield step
                finally:
                    since = self._clock()
        finally:
            self._phases[phase] += self.now() - since

    @contextmanager
    def away(self) -> Iterator[None]:
        """Time that is not the request's, such as what the reader of a stream does between pieces."""
        start, left = self._clock(), time.perf_counter()
        try:
            yield
        finally:
            self._start += self._clock() - start
            self._began += time.perf_counter() - left

    def saw_token(self) -> None:
        """A token is sure to stand: the first one ends the time to first token."""
        if self._first_token is None:  # it is known here, so the device has written it
            self._first_token = time.perf_counter() - self._began

    def seconds(self, phase: str) -> float:
        return self._phases[phase]

    def times(self) -> PhaseTimes:
        wall = self.now() - self._start
        elapsed = time.perf_counter() - self._began
        return PhaseTimes(
            prefill_s=self._phases["prefill"],
            draft_s=self._phases["draft"],
            judge_s=self._phases["judge"],
            decode_s=self._phases["decode"],
            wall_s=wall,
            first_token_s=elapsed if self._first_token is None else self._first_token,
            elapsed_s=elapsed,
        )
