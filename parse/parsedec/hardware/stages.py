"""Stages of a measurement that has to end by a given time, the most valuable first; none can spoil another.

A stage says how long it is expected to take, and for which later stages time has to be left. It is skipped if there is
too little time, and stopped if it takes longer than it may. If it raises, that is noted. In each case, what it has
measured until then stays, and everything is saved after each stage.
"""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from types import FrameType

from parsedec.errors import ConfigError

log = logging.getLogger(__name__)


class TimeIsUp(KeyboardInterrupt):
    """Raised inside a stage whose time is up. As after Ctrl-C, a run in it keeps its finished requests."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A part of the measurement.

    seconds    how long it is expected to take; with less time than that it is not begun
    yields_to  names of later stages for whose expected seconds it has to leave time
    """

    name: str
    seconds: float
    call: Callable[[], None]
    yields_to: tuple[str, ...] = ()


@dataclass(slots=True)
class Done:
    """What became of a stage: finished, skipped, stopped (its time was up), failed or interrupted; and why."""

    name: str
    expected_s: float
    status: str = "running"
    seconds: float = 0.0
    note: str = ""


@dataclass(frozen=True, slots=True)
class Clock:
    """The end of the measurement, on the clock of time.monotonic()."""

    end: float

    @classmethod
    def of(cls, minutes: float, started: float) -> Clock:
        """A clock that ends `minutes` after `started`, the time when the process began to import libraries."""
        if not minutes > 0:
            raise ConfigError(f"minutes={minutes}; expected more than 0.")
        return cls(started + 60 * minutes)

    def left(self) -> float:
        return self.end - time.monotonic()


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise TimeIsUp in the body once `seconds` are over. For the main thread; a call into C is finished first."""

    def ring(_number: int, _frame: FrameType | None) -> None:
        raise TimeIsUp(f"stopped after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run_stages(stages: Sequence[Stage], clock: Clock, save: Callable[[list[dict[str, object]]], object]) -> None:
    """Run stages in order. `save` gets what became of each so far, before the first stage and after every one.

    KeyboardInterrupt passes through, after that was saved.
    """
    _check(stages)
    done: list[Done] = []

    def saved() -> None:
        save([asdict(one) for one in done])

    saved()
    for i, stage in enumerate(stages):
        done.append(Done(stage.name, stage.seconds))
        kept = sum(later.seconds for later in stages[i + 1 :] if later.name in stage.yields_to)
        try:
            _run(stage, done[-1], clock.left() - kept, kept)
        finally:
            log.info("%s: %s, %.0f s; %.0f s left", stage.name, done[-1].status, done[-1].seconds, clock.left())
            saved()


def _run(stage: Stage, done: Done, room: float, kept: float) -> None:
    if room < stage.seconds:
        done.status = "skipped"
        behind = f" beside the {kept:.0f} s of stages behind it" if kept else ""
        done.note = f"expected to take {stage.seconds:.0f} s, and {max(0.0, room):.0f} s are left{behind}"
        return
    start = time.monotonic()
    try:
        with limited(room):
            stage.call()
        done.status = "finished"
    except TimeIsUp as over:
        done.status, done.note = "stopped", str(over)
    except KeyboardInterrupt:
        done.status = "interrupted"
        raise
    except Exception as error:  # whatever goes wrong in one stage, the others are worth having
        log.exception("%s failed", stage.name)
        done.status, done.note = "failed", f"{type(error).__name__}: {error}"
    finally:
        done.seconds = time.monotonic() - start


def _check(stages: Sequence[Stage]) -> None:
    """Raise ConfigError unless names differ and stages only yield to later ones."""
    names = [stage.name for stage in stages]
    for i, stage in enumerate(stages):
        unknown = set(stage.yields_to) - set(names[i + 1 :])
        if unknown or names.count(stage.name) > 1 or stage.seconds < 0:
            raise ConfigError(
                f"the stage {stage.name} has seconds={stage.seconds} and yields_to={list(stage.yields_to)}; expected "
                f"names that occur once, 0 s or more, and to yield to later ones: {names[i + 1 :]}."
            )
