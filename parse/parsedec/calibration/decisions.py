"""What every pair of thresholds keeps of a judged draft, decided by the engine's own boundary rule.

Shapes in this file:  P pairs of thresholds, n samples, K cuts of a sample.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from parsedec.boundary import BoundaryRule
from parsedec.calibration.risk import Losses
from parsedec.calibration.samples import Sample

Pair = tuple[float, float]  # (threshold, full_threshold)


@dataclass(frozen=True, slots=True)
class Decisions:
    """For each pair and sample: how many segments are kept, and whether the draft is taken as complete, both [P, n]."""

    segments: np.ndarray
    whole: np.ndarray


def thresholds(samples: Sequence[Sample], points: int) -> list[float]:
    """Up to `points` scores at which decisions change, and 1 (which keeps next to nothing), in ascending order.

    Half of them are spread evenly over all scores. The other half lie just above the scores of wrong prefixes (of wrong
    drafts, where only answers are labelled), where a threshold shuts an error out.
    """
    scores = [score for sample in samples for score in sample.scores]
    wrong = [score for sample in samples for score in wrong_scores(sample)]
    found = {1.0} | set(_spread(scores, points // 2))
    found |= {min(1.0, math.nextafter(score, 2)) for score in _spread(wrong, points - points // 2)}
    return sorted(found)


def wrong_scores(sample: Sample) -> list[float]:
    """The scores of what is known to be wrong in a draft."""
    if sample.right is None:
        return list(sample.scores[-1:]) if not sample.correct else []
    return [score for score, right in zip(sample.scores, sample.right, strict=True) if not right]


def decide(rule: BoundaryRule, samples: Sequence[Sample], pairs: Sequence[Pair]) -> Decisions:
    """What `rule` keeps of every sample, with each pair in turn in place of its own thresholds."""
    kept, whole = {}, {}
    for threshold in {pair[0] for pair in pairs}:
        floor = replace(rule, threshold=threshold)
        kept[threshold] = np.array([floor.keep(sample.scores) for sample in samples], dtype=int)  # [n]
    for full in {pair[1] for pair in pairs}:
        ceiling = replace(rule, full_threshold=full)
        whole[full] = np.array([bool(s.scores) and ceiling.whole(s.scores[-1]) for s in samples], dtype=bool)
    counts = np.array([len(sample.cuts) for sample in samples], dtype=int)
    wholes = np.stack([whole[full] for _, full in pairs]) if pairs else np.zeros((0, len(samples)), bool)
    parts = np.stack([kept[threshold] for threshold, _ in pairs]) if pairs else np.zeros((0, len(samples)), int)
    return Decisions(np.where(wholes, counts, parts), wholes)


def kept_tokens(samples: Sequence[Sample], decisions: Decisions) -> np.ndarray:
    """Tokens kept of the drafts [P, n]."""
    columns = [
        np.array([sample.kept_tokens(k) for k in range(len(sample.cuts) + 1)])[decisions.segments[:, i]]
        for i, sample in enumerate(samples)
    ]
    return np.stack(columns, axis=1) if columns else np.zeros(decisions.segments.shape, int)


def prefix_losses(samples: Sequence[Sample], decisions: Decisions, of: str) -> Losses:
    """The losses of every pair. An error is a kept prefix with an error in it, or a draft taken as the answer that is
    not a right one. `of`: as in `Goal`."""
    first = np.array([sample.first_wrong for sample in samples], dtype=int)
    correct = np.array([sample.correct for sample in samples], dtype=bool)
    ended = np.array([sample.ended for sample in samples], dtype=bool)
    wrong = np.where(decisions.whole & ended, ~correct, decisions.segments > first)
    counted = decisions.segments > 0 if of == "kept" else np.ones_like(decisions.whole)
    return Losses(wrong, counted, kept_tokens(samples, decisions))


def _spread(scores: Sequence[float], points: int) -> list[float]:
    """Scores at evenly spaced ranks, the first and the last among them."""
    ranked = sorted(set(scores))
    if len(ranked) <= points:
        return ranked
    return [ranked[round(i * (len(ranked) - 1) / max(1, points - 1))] for i in range(points)]
