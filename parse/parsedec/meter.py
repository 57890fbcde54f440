"""What one request takes: wall-clock seconds by phase, and counts of the work done.

On CUDA the device is waited for where a phase begins and ends, so that a phase is charged for the work it started. It
is not waited for between the steps of a phase, nor while the reader of a stream takes its time: a session may have the
device read ahead meanwhile.
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

# Held while a whole device is waited for, and while a graph is captured: CUDA refuses the one during the other.
DEVICE_WIDE = Lock()


def wait_for(device: torch.device | int) -> None:
    """Wait until a CUDA device has done everything it was asked to do."""
    with DEVICE_WIDE:
        torch.cuda.synchronize(device)


@dataclass(slots=True)
class Tally:
    """Counts of a request while it runs; in the end `counters` makes `Counters` of them."""

    judge_passes: int = 0
    judge_rows: int = 0
    draft_tokens: int = 0
    kept_draft_tokens: int = 0
    inner_steps: int = 0
    offered_by_depth: list[int] = field(default_factory=list)
    accepted_by_depth: list[int] = field(default_factory=list)

    def count_tree(self, depth: int, accepted: int) -> None:
        """Count a verified tree of `depth` levels below the root, of which `accepted` were right."""
        self.inner_steps += 1
        missing = depth - len(self.offered_by_depth)
        self.offered_by_depth.extend([0] * missing)
        self.accepted_by_depth.extend([0] * missing)
        for level in range(depth):
            self.offered_by_depth[level] += 1
            self.accepted_by_depth[level] += level < accepted

    def counters(self, **totals: int) -> Counters:
        """The finished counts, together with the totals that only the sessions know."""
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
    """Seconds that one request spends in prefill, draft, judge and decode.

    clock  what tells the seconds; in a batch, those charged to this request (`fibers`). The times to the first token
           and to the end are always real time, in which other requests had their turns, too
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
        """Charge the body's time to `phase`. If not `settled`, without waiting for the devices to finish."""
        now = self.now if settled else self._clock
        start = now()
        try:
            yield
        finally:
            self._phases[phase] += now() - start

    def timed(self, steps: Iterator[T], phase: str) -> Iterator[T]:
        """Yield from `steps`, charging the time inside them to `phase`, but not that of their reader in between."""
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
        """Do not count the body's time: it is not the request's, but that of a stream's reader, say."""
        start, left = self._clock(), time.perf_counter()
        try:
            yield
        finally:
            self._start += self._clock() - start
            self._began += time.perf_counter() - left

    def saw_token(self) -> None:
        """Note that a token is certain to stay in the answer: the first one ends the time to first token."""
        if self._first_token is None:  # no need to wait for the device: the token is known
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
