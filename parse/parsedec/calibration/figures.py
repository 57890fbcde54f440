"""How well a judge separates right from wrong, where it errs, and what every threshold keeps and costs.

Shares come with their counts. Intervals are 95 %: Wilson for shares, and a bootstrap over problems for the area under
the ROC curve, since the prefixes of one draft are not independent.

Shapes in this file:  m judged prefixes, B bins.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from sklearn.metrics import roc_curve

from parsedec.boundary import BoundaryRule
from parsedec.calibration.decisions import decide, kept_tokens, prefix_losses
from parsedec.calibration.risk import Goal, upper_bound
from parsedec.calibration.samples import Sample
from parsedec.experiment.summary import auc, harmonic, resampled, wilson

BINS = 10
DEEPEST = 12  # rows of the heat map; all later segments share the last one
RESAMPLES = 400
ROC_POINTS = 60


def judged(samples: Iterable[Sample], *, complete: bool = False) -> list[list[tuple[float, bool]]]:
    """For each draft the (score, right) pairs of its prefixes, or of the complete draft alone."""
    return [_pairs(sample, complete) for sample in samples if sample.scores]


def judged_by_problem(samples: Iterable[Sample], *, complete: bool = False) -> list[list[tuple[float, bool]]]:
    """As `judged`, with the pairs of all drafts of a problem together, since problems are what is resampled."""
    pairs: dict[str, list[tuple[float, bool]]] = {}
    for sample in samples:
        if sample.scores:
            pairs.setdefault(sample.group, []).extend(_pairs(sample, complete))
    return list(pairs.values())


def _pairs(sample: Sample, complete: bool) -> list[tuple[float, bool]]:
    if complete or sample.right is None:
        return [(sample.scores[-1], sample.correct)]
    return list(zip(sample.scores, sample.right, strict=True))


def separation(problems: Sequence[Sequence[tuple[float, bool]]], seed: int) -> dict[str, Any]:
    """The area under the ROC curve, its interval (problems are resampled) and the curve itself.

    Area and interval are None, and the curve is empty, unless there are both right and wrong ones.
    """
    scores, right = _flat(problems)
    counts = {"right": int(right.sum()), "wrong": int((~right).sum())}
    if not all(counts.values()):
        return counts | {"auc": None, "interval": None, "curve": []}
    areas = []
    for draw in resampled(len(problems), seed, RESAMPLES):
        some, marks = _flat([problems[i] for i in draw])
        if marks.any() and not marks.all():
            areas.append(auc(some, marks))
    false, true, _ = roc_curve(right, scores)
    step = max(1, len(false) // ROC_POINTS)
    curve = [[float(f), float(t)] for f, t in zip(false[::step], true[::step], strict=True)] + [[1.0, 1.0]]
    low, high = np.percentile(areas, [2.5, 97.5])
    return counts | {
        "auc": auc(scores, right), "interval": [float(low), float(high)], "curve": curve}  # fmt: skip


def reliability(drafts: Sequence[Sequence[tuple[float, bool]]], bins: int = BINS) -> dict[str, Any]:
    """Whether what is scored s is right in a share s of cases, in bins of equal width.

    ece  expected calibration error: the mean distance between score and share right, bins weighted by their counts
    """
    scores, right = _flat(drafts)
    place = np.minimum((scores * bins).astype(int), bins - 1)  # [m]
    rows: list[dict[str, Any]] = []
    for i in range(bins):
        here = place == i
        if count := int(here.sum()):
            hits = int(right[here].sum())
            rows.append({"low": i / bins, "high": (i + 1) / bins, "count": count, "score": float(scores[here].mean()),
                         "right": hits / count, "interval": wilson(hits, count)})  # fmt: skip
    total = sum(row["count"] for row in rows)
    ece = sum(row["count"] * abs(row["score"] - row["right"]) for row in rows) / total if total else None
    return {"bins": rows, "ece": ece, "count": total}


def mistakes(drafts: Sequence[Sequence[tuple[float, bool]]], threshold: float) -> dict[str, Any]:
    """False accepts as a share of what is wrong, false refusals as a share of what is right, with their intervals."""
    scores, right = _flat(drafts)
    passed = scores >= threshold
    return {
        "threshold": threshold,
        "false_accepts": _share(int((passed & ~right).sum()), int((~right).sum())),
        "false_refusals": _share(int((~passed & right).sum()), int(right.sum())),
    }


def localisation(samples: Sequence[Sample], rule: BoundaryRule) -> dict[str, Any]:
    """Where the boundary rule stops, compared with the first wrong cut.

    exact, never_later  of the drafts with a wrong prefix, those cut just before it, and those cut there or earlier
    untouched           of the drafts without one, those kept to the end
    f1                  harmonic mean of `exact` and `untouched`, as ProcessBench (arXiv 2412.06559) defines it
    """
    stops = [(rule.keep(sample.scores), sample.first_wrong, len(sample.cuts)) for sample in samples if sample.cuts]
    wrong = [(stop, first) for stop, first, cuts in stops if first < cuts]
    sound = [stop == cuts for stop, first, cuts in stops if first == cuts]
    exact = _share(sum(stop == first for stop, first in wrong), len(wrong))
    untouched = _share(sum(sound), len(sound))
    return {
        "threshold": rule.floor,
        "exact": exact,
        "never_later": _share(sum(stop <= first for stop, first in wrong), len(wrong)),
        "untouched": untouched,
        "f1": harmonic(exact["share"], untouched["share"]),
    }


def best_localisation(fit: Sequence[Sample], check: Sequence[Sample], rule: BoundaryRule, grid: Sequence[float]) -> Any:
    """`localisation` on `check` at the threshold with the best F1 on `fit`, and that F1."""
    tried = [(localisation(fit, replace(rule, threshold=threshold))["f1"] or 0.0, threshold) for threshold in grid]
    best, threshold = max(tried)
    return localisation(check, replace(rule, threshold=threshold)) | {"f1_on_fit": best}


def by_position(samples: Sequence[Sample], threshold: float, bins: int = BINS) -> dict[str, Any]:
    """The heat map: counts of prefixes by the index of their last segment and by score, and the mistakes by position.

    right, wrong  [positions, bins] counts; the last position holds all later ones
    """
    right, wrong = np.zeros((DEEPEST, bins), int), np.zeros((DEEPEST, bins), int)
    rows: list[list[tuple[float, bool]]] = [[] for _ in range(DEEPEST)]
    for draft in judged(samples):
        for k, (score, good) in enumerate(draft):
            place = min(k, DEEPEST - 1)
            (right if good else wrong)[place, min(int(score * bins), bins - 1)] += 1
            rows[place].append((score, good))
    used = max((i + 1 for i, row in enumerate(rows) if row), default=0)
    return {
        "positions": [{"segment": i, "later_too": i == DEEPEST - 1} | mistakes([rows[i]], threshold)
                      for i in range(used)],
        "edges": [i / bins for i in range(bins + 1)],
        "right": right[:used].tolist(),
        "wrong": wrong[:used].tolist(),
    }  # fmt: skip


def sweep(samples: Sequence[Sample], rule: BoundaryRule, goal: Goal, grid: Sequence[float]) -> list[dict[str, Any]]:
    """Kept share, errors and their upper bound at every threshold, used for prefixes and complete drafts alike."""
    decisions = decide(rule, samples, [(threshold, threshold) for threshold in grid])
    losses = prefix_losses(samples, decisions, goal.of)
    drafted = sum(len(sample.tokens) for sample in samples)
    whole_wrong = decisions.whole & np.array([not sample.correct for sample in samples], dtype=bool)
    return [
        {
            "threshold": threshold,
            "kept_share": float(losses.kept[i].sum() / max(1, drafted)),
            "accepted_whole": int(decisions.whole[i].sum()),
            "accepted_whole_wrong": int(whole_wrong[i].sum()),
            "errors": int(losses.errors[i]),
            "counted": int(losses.counts[i]),
            "risk": float(losses.errors[i] / max(1, losses.counts[i])),
            "upper": upper_bound(int(losses.errors[i]), int(losses.counts[i]), goal.confidence),
        }
        for i, threshold in enumerate(grid)
    ]


def kept_share(samples: Sequence[Sample], rule: BoundaryRule, pair: tuple[float, float]) -> dict[str, Any]:
    """What one pair of thresholds keeps: share of tokens, drafts taken as complete, drafts kept at least in part."""
    decisions = decide(rule, samples, [pair])
    drafted = sum(len(sample.tokens) for sample in samples)
    return {
        "kept_share": float(kept_tokens(samples, decisions).sum() / max(1, drafted)),
        "accepted_whole": int(decisions.whole.sum()),
        "kept_something": int((decisions.segments > 0).sum()),
        "drafts": len(samples),
        "drafts_right": sum(sample.correct for sample in samples),
    }


def _flat(drafts: Iterable[Sequence[tuple[float, bool]]]) -> tuple[np.ndarray, np.ndarray]:
    """Scores [m] and labels [m] of all drafts."""
    pairs = [pair for draft in drafts for pair in draft]
    return np.array([score for score, _ in pairs], dtype=float), np.array([right for _, right in pairs], dtype=bool)


def _share(hits: int, n: int) -> dict[str, Any]:
    return {"count": hits, "of": n, "share": hits / n if n else None, "interval": wilson(hits, n) if n else None}
