"""Boundary rules: how much of a draft to keep, given the scores of its prefixes."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, Self

from parsedec.errors import ConfigError, require_number

DEFAULT_THRESHOLD = 0.9


class Thresholds(Protocol):
    """Thresholds calibrated for the scores of one judge on one target, e.g. a judge card."""

    @property
    def threshold(self) -> float: ...

    @property
    def full_threshold(self) -> float: ...


@dataclass(frozen=True, kw_only=True)
class BoundaryRule(ABC):
    """Base of all rules.

    threshold       lowest score at which a prefix passes
    full_threshold  lowest score at which the complete draft is the answer (the holistic check)

    None: the value on the judge's card, e.g. the target's if the judge asks the question it was made for; else 0.9.
    """

    threshold: float | None = None
    full_threshold: float | None = None

    def __post_init__(self) -> None:
        for name in ("threshold", "full_threshold"):
            if getattr(self, name) is not None:
                require_number(f"boundary.{name}", getattr(self, name))
        if not all(0 <= value <= 1 for value in (self.threshold, self.full_threshold) if value is not None):
            raise ConfigError(
                f"boundary has threshold={self.threshold}, full_threshold={self.full_threshold}; expected "
                "probabilities from 0 to 1."
            )

    def bind(self, card: Thresholds | None) -> Self:
        """A copy that uses the judge card's thresholds where none were set."""
        return replace(
            self,
            threshold=_first(self.threshold, card.threshold if card else None),
            full_threshold=_first(self.full_threshold, card.full_threshold if card else None),
        )

    @property
    def floor(self) -> float:
        """The prefix threshold in force."""
        return _first(self.threshold)

    def whole(self, score: float) -> bool:
        """Whether a complete draft with this score is the answer."""
        return score >= _first(self.full_threshold)

    @abstractmethod
    def keep(self, scores: Sequence[float]) -> int:
        """How many leading segments to keep of a draft that is not the answer as a whole."""


class FirstFailure(BoundaryRule):
    """Keep up to the first prefix that fails: every earlier one must pass. The safe rule, and the default."""

    def keep(self, scores: Sequence[float]) -> int:
        return next((k for k, score in enumerate(scores) if not score >= self.floor), len(scores))


class LongestValid(BoundaryRule):
    """Keep the longest prefix that passes, even if earlier ones fail; a false pass late in a draft costs accuracy."""

    def keep(self, scores: Sequence[float]) -> int:
        return max((k + 1 for k, score in enumerate(scores) if score >= self.floor), default=0)


@dataclass(frozen=True, kw_only=True)
class Smoothed(BoundaryRule):
    """First failure of the mean log-odds of the last `window` prefixes, so that no single odd score decides."""

    window: int = 3

    def __post_init__(self) -> None:
        BoundaryRule.__post_init__(self)
        require_number("boundary.window", self.window, whole=True, low=1)

    def keep(self, scores: Sequence[float]) -> int:
        odds = [log_odds(score) for score in scores]
        floor = log_odds(self.floor)
        for k in range(len(odds)):
            recent = odds[max(0, k + 1 - self.window) : k + 1]
            if not sum(recent) / len(recent) >= floor - 1e-9:  # the mean of equal numbers may round to less
                return k
        return len(odds)


def _first(*values: float | None) -> float:
    """The first value that is set, or else the default threshold."""
    return next((value for value in values if value is not None), DEFAULT_THRESHOLD)


def log_odds(p: float) -> float:
    """log(p / (1 - p)), finite at 0 and 1."""
    p = min(max(p, 1e-6), 1 - 1e-6)
    return math.log(p / (1 - p))
