"""Boundary rules: from the scores of the prefixes to what of the draft stands."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from parsedec.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class BoundaryRule:
    """Base of all rules.

    threshold       least score with which a prefix passes
    full_threshold  least score with which the complete draft is the answer (the holistic check)
    """

    threshold: float = 0.9
    full_threshold: float = 0.9

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1 or not 0 <= self.full_threshold <= 1:
            raise ConfigError(
                f"boundary has threshold={self.threshold}, full_threshold={self.full_threshold}; expected "
                "probabilities from 0 to 1."
            )

    def whole(self, score: float) -> bool:
        """Whether a complete draft with this score is the answer."""
        return score >= self.full_threshold

    def keep(self, scores: Sequence[float]) -> int:
        """How many leading segments of a refused draft stand."""
        raise NotImplementedError(f"{type(self).__name__} defines no keep()")


class FirstFailure(BoundaryRule):
    """Keep up to the first prefix that fails: every earlier one must pass. The safe rule, and the default."""

    def keep(self, scores: Sequence[float]) -> int:
        return next((k for k, score in enumerate(scores) if score < self.threshold), len(scores))


class LongestValid(BoundaryRule):
    """Keep the longest prefix that passes, whatever earlier ones say; a late false pass costs accuracy."""

    def keep(self, scores: Sequence[float]) -> int:
        return max((k + 1 for k, score in enumerate(scores) if score >= self.threshold), default=0)


@dataclass(frozen=True, kw_only=True)
class Smoothed(BoundaryRule):
    """First failure of the running mean of log-odds over the last `window` prefixes: one odd score does not decide."""

    window: int = 3

    def __post_init__(self) -> None:
        BoundaryRule.__post_init__(self)
        if self.window < 1:
            raise ConfigError(f"boundary.window={self.window}; expected at least 1 prefix.")

    def keep(self, scores: Sequence[float]) -> int:
        odds = [log_odds(score) for score in scores]
        floor = log_odds(self.threshold)
        for k in range(len(odds)):
            recent = odds[max(0, k + 1 - self.window) : k + 1]
            if sum(recent) / len(recent) < floor:
                return k
        return len(odds)


def log_odds(p: float) -> float:
    """log(p / (1 - p)), finite at 0 and 1."""
    p = min(max(p, 1e-6), 1 - 1e-6)
    return math.log(p / (1 - p))
