"""From counted errors to a threshold that keeps a goal.

The goal "of the drafts of which something is kept, at most 1 % keep something wrong, with 95 % confidence" is a
statement about the very thresholds that are used, so a bound on the expected risk, as conformal risk control gives it
(Angelopoulos et al., arXiv 2208.02814), is not enough. The goal counts first drafts of requests or, where only final
answers are labelled, spoilt requests. The default method is Learn-then-Test (2110.01052; for monotone risks it is RCPS,
2101.02703) with split fixed-sequence testing:

1. some problems are set aside to explore: they alone choose a path of threshold pairs, from strict to lax;
2. on the others every pair of the path is tested in turn: the hypothesis "the risk exceeds the goal" is rejected if so
   few errors have probability 1 - confidence or less under it, P(Binomial(k, risk) <= errors), exactly;
3. the path ends at the first pair for which the hypothesis is not rejected.

The chance that the chosen pair breaks the goal is then at most 1 - confidence, for any score and any sample size: the
test would have to pass the first pair on the path that breaks it. Problems are assumed to be drawn independently from
those asked later; nothing is claimed for other kinds of problems. Several solutions to a problem are one draw, not
several, so one of each problem is tested. `method=crc` bounds the expected risk instead.

Shapes in this file:  P pairs of thresholds, n samples.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from parsedec.errors import ConfigError, ParsedecError

try:
    from scipy.stats import beta, binom
except ImportError as missing:
    raise ParsedecError(
        "calibration needs scipy and scikit-learn, which are not installed. pip install 'parsedec[eval]'."
    ) from missing

METHODS = ("fixed_sequence", "crc")
OF = ("kept", "requests")


@dataclass(frozen=True, kw_only=True)
class Goal:
    """The goal that thresholds have to keep, and how to find them.

    risk        largest share of errors
    confidence  probability with which the fitted thresholds keep it (fixed_sequence)
    of          what it is a share of: "kept", the first drafts of which something was kept, or "requests", all of them
    method      "fixed_sequence" or "crc" (expected risk over requests, one threshold for both, no confidence)
    explore     share of the problems that only choose the path (fixed_sequence)
    points      how many thresholds of each kind to try
    """

    risk: float = 0.01
    confidence: float = 0.95
    of: str = "kept"
    method: str = "fixed_sequence"
    explore: float = 0.2
    points: int = 40

    def __post_init__(self) -> None:
        if self.method not in METHODS or self.of not in OF:
            raise ConfigError(
                f"goal.method={self.method!r}, goal.of={self.of!r}; expected one of {', '.join(METHODS)} and one of "
                f"{', '.join(OF)}."
            )
        for name in ("risk", "confidence", "explore"):
            if not 0 < getattr(self, name) < 1:
                raise ConfigError(f"goal.{name}={getattr(self, name)}; expected a share between 0 and 1.")
        if self.points < 2:
            raise ConfigError(f"goal.points={self.points}; expected at least 2 thresholds to try.")
        if self.method == "crc" and self.of != "requests":
            raise ConfigError(
                "goal.method=crc bounds the share of all requests, whose errors only grow as thresholds fall; the "
                "share of the kept ones need not. Set goal.of=requests, or goal.method=fixed_sequence."
            )

    @property
    def least(self) -> int:
        """The fewest samples that can show thresholds without any error to keep the goal."""
        if self.method == "crc":
            return math.ceil(1 / self.risk) - 1
        return math.ceil(math.log(1 - self.confidence) / math.log(1 - self.risk))

    def least_risk(self, samples: int) -> float:
        """The smallest risk that `samples` samples without an error can show, rounded up."""
        if samples < 1:
            return 1.0
        risk = 1 / (samples + 1) if self.method == "crc" else 1 - (1 - self.confidence) ** (1 / samples)
        return math.ceil(risk * 1000) / 1000

    def power(self, errors: np.ndarray, counts: np.ndarray, explored: int, ahead: int) -> np.ndarray:
        """How likely each pair is to pass its test on `ahead` other samples [P].

        errors, counts  [P] of the samples explored, which are `explored` in number
        Shares are smoothed by half a sample, since a pair that has made no error so far may still make some.
        """
        samples = np.round((counts + 0.5) / (explored + 1) * ahead)
        most = binom.ppf(1 - self.confidence, samples, self.risk)
        most = np.where(binom.cdf(most, samples, self.risk) <= 1 - self.confidence, most, most - 1)
        passes = binom.cdf(most, samples, (errors + 0.5) / (counts + 1))
        return np.where(samples > 0, passes, 0.0)

    def p_value(self, errors: int, of: int) -> float:
        """The largest probability of so few errors among `of` samples if the risk exceeds the goal (exact binomial)."""
        return float(binom.cdf(errors, of, self.risk)) if of else 1.0


@dataclass(frozen=True, slots=True)
class Losses:
    """What every pair of thresholds does to every sample.

    wrong    [P, n] whether it is an error
    counted  [P, n] whether the sample is among those of which the risk is a share
    kept     [P, n] tokens kept of the draft
    """

    wrong: np.ndarray
    counted: np.ndarray
    kept: np.ndarray

    def of(self, samples: np.ndarray) -> Losses:
        """The columns of some samples (indices or a mask)."""
        return Losses(self.wrong[:, samples], self.counted[:, samples], self.kept[:, samples])

    @property
    def errors(self) -> np.ndarray:
        return np.asarray((self.wrong & self.counted).sum(1))  # [P]

    @property
    def counts(self) -> np.ndarray:
        return np.asarray(self.counted.sum(1))  # [P]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """The outcome of a fit.

    chosen  index of the pair chosen; None if no pair was shown to keep the goal
    tested  the pairs looked at, in order, with their errors, counts and p-values (crc: bounds on the expected risk)
    reason  why no pair was chosen
    """

    chosen: int | None
    tested: tuple[dict[str, Any], ...]
    reason: str | None = None


def upper_bound(errors: int, of: int, confidence: float) -> float:
    """Clopper and Pearson's one-sided upper bound of a share: exact, so never too low."""
    return 1.0 if errors >= of else float(beta.ppf(confidence, errors + 1, of - errors))


def lower_bound(errors: int, of: int, confidence: float) -> float:
    """The lower bound to match `upper_bound`."""
    return 0.0 if errors == 0 else float(beta.ppf(1 - confidence, errors, of - errors + 1))


def choose_path(goal: Goal, losses: Losses, levels: Sequence[tuple[int, int]], ahead: int) -> list[int]:
    """The pairs to test, from strict to lax, chosen on the samples set aside to explore.

    levels  the ranks of each pair's two thresholds on their grids; a pair is stricter if both are higher
    ahead   how many samples are left for the test

    The path begins at the strictest of the pairs that are (nearly) the most likely to pass: stricter ones keep too few
    drafts to show anything, and the path would end there. Next are pairs that keep ever more with the same share of
    errors, then those that keep the most for the errors they make (the Pareto front).
    """
    errors, counts, gain = losses.errors, losses.counts, losses.kept.sum(1)
    share = errors / np.maximum(counts, 1)
    power = goal.power(errors, counts, losses.counted.shape[1], ahead)
    likely = np.flatnonzero(power >= 0.9 * power.max()) if power.max() > 0 else np.array([], int)
    if not len(likely):
        return []
    strict: dict[int, int] = {}  # tokens kept -> the strictest pair that keeps so many
    for pair in likely[share[likely] == share[likely].min()].tolist():
        kept = int(gain[pair])
        if kept not in strict or sum(levels[pair]) > sum(levels[strict[kept]]):
            strict[kept] = pair
    path = [strict[kept] for kept in sorted(strict)]
    for pair in sorted(range(len(levels)), key=lambda p: (share[p], -gain[p], -sum(levels[p]))):
        if gain[pair] > gain[path[-1]] and power[pair] > 0:
            path.append(pair)
    return path


def fixed_sequence(goal: Goal, losses: Losses, path: Sequence[int]) -> Fit:
    """Test the pairs of a path chosen without these samples; of those that pass, choose the one that keeps the most."""
    passed: list[int] = []
    tested: list[dict[str, Any]] = []
    errors, counts, gain = losses.errors, losses.counts, losses.kept.sum(1)
    for pair in path:
        p = goal.p_value(int(errors[pair]), int(counts[pair]))
        tested.append({"pair": int(pair), "errors": int(errors[pair]), "counted": int(counts[pair]), "p": p})
        if p > 1 - goal.confidence:
            break
        passed.append(pair)
    if passed:
        return Fit(chosen=max(passed, key=lambda pair: int(gain[pair])), tested=tuple(tested))
    if not path:
        reason = (
            f"no pair of thresholds counts the {goal.least} samples that showing the goal takes; label more problems"
        )
    else:
        one = tested[0]
        reason = (
            f"the strictest pair tested made {one['errors']} errors in {one['counted']} samples (p = {one['p']:.3g}, "
            f"expected at most {1 - goal.confidence:.3g}); label more problems, allow more risk, or use a better judge"
        )
    return Fit(chosen=None, tested=tuple(tested), reason=reason)


def conformal(goal: Goal, losses: Losses, path: Sequence[int]) -> Fit:
    """Conformal risk control along a path from strict to lax, on which a sample's error never goes away again.

    Chooses the last pair with (errors + 1) / (n + 1) <= risk: its expected risk on the next request is at most the
    goal's.
    """
    chosen, tested = None, []
    errors, counts = losses.errors, losses.counts
    for pair in path:
        bound = (int(errors[pair]) + 1) / (int(counts[pair]) + 1)
        tested.append({"pair": int(pair), "errors": int(errors[pair]), "counted": int(counts[pair]), "bound": bound})
        if bound > goal.risk:
            break
        chosen = int(pair)
    reason = None
    if chosen is None:
        reason = f"the strictest threshold has an expected risk of up to {tested[0]['bound']:.3g}; label more problems"
    return Fit(chosen=chosen, tested=tuple(tested), reason=reason)


def check(goal: Goal, errors: int, of: int) -> dict[str, Any]:
    """The goal checked on samples that chose nothing: the share of errors with its 95 % interval, and a verdict.

    confirmed         the upper bound is within the goal, so these samples alone show it
    violated          the lower bound exceeds the goal
    not contradicted  neither
    """
    upper = upper_bound(errors, of, goal.confidence) if of else 1.0
    lower = lower_bound(errors, of, goal.confidence) if of else 0.0
    verdict = "confirmed" if upper <= goal.risk else "violated" if lower > goal.risk else "not contradicted"
    return {
        "errors": errors,
        "counted": of,
        "risk": errors / of if of else None,
        "interval": [lower_bound(errors, of, 0.975), upper_bound(errors, of, 0.975)] if of else [0.0, 1.0],
        "upper": upper,
        "verdict": verdict,
    }


def drawn(names: Sequence[str], share: float, seed: int, purpose: str) -> np.ndarray:
    """Whether each named problem belongs to a random share [n]; independent of the order and of the other names."""
    digests = (hashlib.sha256(f"{purpose}/{seed}/{name}".encode()).digest()[:8] for name in names)
    return np.array([int.from_bytes(digest, "big") / 2**64 < share for digest in digests], dtype=bool)
