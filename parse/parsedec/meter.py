"""Wall-clock by phase. On CUDA every boundary synchronises, so a phase holds the work it started."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

from parsedec.types import PhaseTimes

T = TypeVar("T")


class Meter:
    """Seconds spent in prefill, draft, judge and decode of one request."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._phases: dict[str, float] = defaultdict(float)
        self._start = self.now()
        self._first_token: float | None = None

    def now(self) -> float:
        if self._cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    @contextmanager
    def span(self, phase: str) -> Iterator[None]:
        start = self.now()
        try:
            yield
        finally:
            self._phases[phase] += self.now() - start

    def timed(self, steps: Iterator[T], phase: str) -> Iterator[T]:
        """Pass `steps` on, counting the time inside them but not what their reader does between."""
        while True:
            with self.span(phase):
                step = next(steps, None)
            if step is None:
                return
            yield step

    def saw_token(self) -> None:
        """A token is sure to stand: the first one ends the time to first token."""
        if self._first_token is None:
            self._first_token = self.now() - self._start

    def seconds(self, phase: str) -> float:
        return self._phases[phase]

    def times(self) -> PhaseTimes:
        wall = self.now() - self._start
        first = wall if self._first_token is None else self._first_token
        return PhaseTimes(
            prefill_s=self._phases["prefill"],
            draft_s=self._phases["draft"],
            judge_s=self._phases["judge"],
            decode_s=self._phases["decode"],
            wall_s=wall,
            first_token_s=first,
        )
