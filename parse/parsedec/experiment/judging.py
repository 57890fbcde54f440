"""Judges side by side on the same labelled drafts: how well they tell right prefixes from wrong, and what they cost.

Scores of different judges lie on different scales, so they are compared where they keep the same share of the drafts,
under the engine's first-failure rule; the whole curve is in the record. Costs are wall-clock of a judge pass over a
whole draft behind a prompt that is read already, the judges alternating, beside one-token steps.

Shapes in this file:  D drafts, P prefixes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from parsedec.errors import ConfigError
from parsedec.experiment.summary import harmonic, wilson
from parsedec.experiment.table import document, grid, origin, tier
from parsedec.judge import Judge, judging_session
from parsedec.judge.combined import log_odds
from parsedec.models.language_model import LanguageModel
from parsedec.sessions.backends import open_session
from parsedec.training.prefixes import Marked

Floats = NDArray[np.float64]
Indices = NDArray[np.intp]
RESAMPLES = 2000
STEPS = 4  # one-token steps timed per draft
CURVE = 25  # thresholds of a curve


@dataclass(slots=True)
class Verdicts:
    """What one judge said of every draft, and what it took."""

    scores: list[tuple[float, ...]] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    path: str = ""


def measure(
    target: LanguageModel,
    judges: Mapping[str, Judge],
    marked: Sequence[Marked],
    after_each: Callable[[str], None] = lambda _: None,
) -> tuple[dict[str, Verdicts], list[float]]:
    """Verdicts of the bound judges, and seconds of one-token steps behind the drafts' prompts. The first draft is gone
    through twice, and its first time does not count."""
    said, steps = {name: Verdicts() for name in judges}, list[float]()
    for i, one in enumerate([marked[0], *marked]):
        order = list(judges)[i % len(judges) :] + list(judges)[: i % len(judges)]
        for name in order:
            session = judging_session(target, judges[name])
            session.feed(one.prompt)
            started = _now(target)
            scores = judges[name].score(session, one.draft, one.cuts, one.cuts)
            seconds = _now(target) - started
            if i:
                verdicts = said[name]
                verdicts.scores.append(scores.values)
                verdicts.rows.append(scores.rows)
                verdicts.seconds.append(seconds)
                verdicts.path = str(scores.path)
        session = open_session(target)
        session.feed(one.prompt)
        started = _now(target)
        for token in one.draft.tokens[:STEPS]:
            session.feed([token])
        if i:
            steps.append((_now(target) - started) / min(STEPS, len(one.draft.tokens)))
            after_each("drafts")
    return said, steps


def divided(marked: Sequence[Marked], folds: int = 5) -> list[tuple[Indices, Indices]]:
    """Prefixes to fit a combination of judges on, and those it then scores: a pair for each part of the problems.

    Raises ConfigError where there are fewer problems than parts, or a fit would see one verdict only.
    """
    from sklearn.model_selection import GroupKFold

    right = np.array([good for one in marked for good in one.right])
    problems = np.repeat([one.problem for one in marked], [len(one.cuts) for one in marked])
    if len(set(problems)) < folds:
        raise ConfigError(
            f"combinations of judges are fitted on {folds - 1} of {folds} parts of the problems, and there are "
            f"{len(set(problems))} problems; give more, or leave `combinations` empty."
        )
    parts = list(GroupKFold(folds).split(right, groups=problems))
    if any(right[train].all() or not right[train].any() for train, _ in parts):
        raise ConfigError("combinations of judges need right and wrong prefixes in every part; give more drafts.")
    return parts


def cross_fitted(parts: Sequence[Verdicts], marked: Sequence[Marked]) -> Verdicts:
    """What a logistic regression over the log-odds of several judges says of drafts it was not fitted on.

    Each part's scores come from a fit to the others. What it takes is the sum over the judges, an upper bound:
    judge=combined reads several off one pass. Raises ConfigError as `divided` does.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    right = np.array([good for one in marked for good in one.right])
    flat = torch.tensor([[v for row in part.scores for v in row] for part in parts])
    features = log_odds(flat).double().numpy().T  # [P, judges]
    scores = np.empty(len(right))
    for train, unseen in divided(marked):
        model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(features[train], right[train])
        scores[unseen] = model.predict_proba(features[unseen])[:, 1]
    each = np.split(scores, np.cumsum([len(one.cuts) for one in marked])[:-1])
    return Verdicts(
        scores=[tuple(map(float, one)) for one in each],
        rows=[sum(rows) for rows in zip(*(part.rows for part in parts), strict=True)],
        seconds=[sum(taken) for taken in zip(*(part.seconds for part in parts), strict=True)],
        path="cross-fitted",
    )


def summarise(
    said: Mapping[str, Verdicts],
    steps: Sequence[float],
    marked: Sequence[Marked],
    *,
    kept_share: float | None,
    threshold: float,
    seed: int = 0,
) -> dict[str, Any]:
    """Quality and cost of every judge. `auc` is the area of all prefixes, `auc_whole` that of whole drafts with its
    interval, both None where they are all right or all wrong.

    kept_share  share of the draft tokens each judge is to keep at most; None: what the first judge keeps at `threshold`
    """
    first = next(iter(said.values()))
    wanted = share_kept(marked, first.scores, threshold) if kept_share is None else kept_share
    draws = (
        np.random.default_rng(seed).multinomial(len(marked), [1 / len(marked)] * len(marked), RESAMPLES).astype(float)
    )
    areas = {name: _areas(marked, verdicts.scores, draws) for name, verdicts in said.items()}
    whole = _whole_areas(marked, said, draws)
    against = areas[next(iter(said))]
    step, known = float(np.median(steps)), bool(np.isfinite(against[0]))
    judges = {}
    for name, verdicts in said.items():
        point, spread = areas[name]
        at = threshold_keeping(marked, verdicts.scores, wanted)
        curve = [localised(marked, verdicts.scores, t) for t in _curve(verdicts.scores)]
        pass_s = float(np.median(verdicts.seconds))
        judges[name] = {
            "path": verdicts.path,
            "auc": point if known else None,
            "auc_interval": _interval(spread) if known else None,
            "auc_difference": point - against[0] if known else None,
            "auc_difference_interval": _interval(spread - against[1]) if known else None,
            "auc_whole": whole[name],
            "at": localised(marked, verdicts.scores, at),
            "curve": curve,
            "f1": max((one["f1"] for one in curve if one["f1"] is not None), default=None),
            "rows": sum(verdicts.rows) / len(verdicts.rows),
            "pass_s": pass_s,
            "decode_steps": pass_s / step,
        }
    right = [good for one in marked for good in one.right]
    return {
        "drafts": len(marked),
        "ended": sum(one.draft.ended for one in marked),
        "prefixes": len(right),
        "wrong_prefixes": len(right) - sum(right),
        "draft_tokens": sum(len(one.draft.tokens) for one in marked) / len(marked),
        "kept_share": wanted,
        "decode_step_s": step,
        "judges": judges,
    }


def localised(marked: Sequence[Marked], scores: Sequence[Sequence[float]], threshold: float) -> dict[str, Any]:
    """Where the first-failure rule puts the boundary: at the first error of the wrong drafts, or not behind it.

    passed  share of the right drafts that are kept whole; None where there is none
    f1      harmonic mean of that and the share of wrong drafts whose error is found exactly (ProcessBench's measure,
            arXiv 2412.06559); None where there are not both kinds of drafts
    """
    kept = [leading(values, threshold) for values in scores]
    wrong = [(k, one.first_wrong) for k, one in zip(kept, marked, strict=True) if one.first_wrong < len(one.cuts)]
    whole = [k == len(one.cuts) for k, one in zip(kept, marked, strict=True) if one.first_wrong >= len(one.cuts)]
    found = sum(k == error for k, error in wrong) / len(wrong) if wrong else None
    passed = sum(whole) / len(whole) if whole else None
    return {
        "threshold": threshold,
        "kept_share": share_kept(marked, scores, threshold),
        "wrong_drafts": len(wrong),
        "exact": sum(k == error for k, error in wrong),
        "never_later": sum(k <= error for k, error in wrong),
        "passed": passed,
        "f1": harmonic(found, passed),
    }


def leading(values: Sequence[float], threshold: float) -> int:
    """Prefixes before the first that fails."""
    return next((k for k, value in enumerate(values) if value < threshold), len(values))


def share_kept(marked: Sequence[Marked], scores: Sequence[Sequence[float]], threshold: float) -> float:
    """Share of the draft tokens that stand under the first-failure rule."""
    kept = [(0, *one.cuts)[leading(values, threshold)] for one, values in zip(marked, scores, strict=True)]
    return sum(kept) / sum(len(one.draft.tokens) for one in marked)


def threshold_keeping(marked: Sequence[Marked], scores: Sequence[Sequence[float]], share: float) -> float:
    """The lowest threshold, out of the scores given, at which at most `share` of the draft tokens stand; 1 if there is
    none."""
    least = [np.minimum.accumulate(values) for values in scores]  # a prefix stands if all up to it pass
    tokens = [np.diff((0, *one.cuts)) for one in marked]
    value, weight = np.concatenate(least), np.concatenate(tokens)
    order = np.argsort(-value, kind="stable")
    kept = np.cumsum(weight[order]) / sum(len(one.draft.tokens) for one in marked)
    last = np.append(np.diff(value[order]) < 0, True)  # equal scores stand or fall together
    good = value[order][last & (kept <= share + 1e-12)]
    return float(good[-1]) if len(good) else 1.0


def _areas(marked: Sequence[Marked], scores: Sequence[Sequence[float]], draws: Floats) -> tuple[float, Floats]:
    """Area under the ROC curve, and under those of resampled drafts: draws [R, D] counts how often each was drawn."""
    values = np.array([value for row in scores for value in row])
    right = np.array([good for one in marked for good in one.right])
    owner = np.repeat(np.arange(len(marked)), [len(row) for row in scores])
    _, rank = np.unique(values, return_inverse=True)
    count = int(rank.max()) + 1

    def area(weight: Floats) -> float:
        good = np.bincount(rank[right], weight[right], count)
        bad = np.bincount(rank[~right], weight[~right], count)
        pairs = good.sum() * bad.sum()
        return float((good * (np.cumsum(bad) - bad / 2)).sum() / pairs) if pairs else np.nan

    return area(np.ones(len(values))), np.array([area(drawn[owner]) for drawn in draws])


def _whole_areas(
    marked: Sequence[Marked], said: Mapping[str, Verdicts], draws: Floats
) -> Mapping[str, list[float] | None]:
    """Area and interval of every judge's last verdict on the drafts that ended: no other can be the whole answer."""
    ended = [i for i, one in enumerate(marked) if one.draft.ended]
    ends = [replace(marked[i], cuts=marked[i].cuts[-1:], right=marked[i].right[-1:]) for i in ended]
    if len({one.right for one in ends}) < 2:
        return dict.fromkeys(said)
    found = {}
    for name, verdicts in said.items():
        point, spread = _areas(ends, [verdicts.scores[i][-1:] for i in ended], draws[:, ended])
        found[name] = [point, *_interval(spread)]
    return found


def _interval(values: Floats) -> list[float]:
    return [float(bound) for bound in np.nanpercentile(values, (2.5, 97.5))]


def _curve(scores: Sequence[Sequence[float]]) -> list[float]:
    """Thresholds evenly spread over the scores given."""
    values = np.array([value for row in scores for value in row])
    return sorted({float(value) for value in np.quantile(values, np.linspace(0, 1, CURVE), method="nearest")})


def _now(model: LanguageModel) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return perf_counter()


QUALITY = ("judge", "pass", "AUC", "less the first's")
AT_THRESHOLD = ("threshold", "kept", "first error exactly", "never later", "best F1")
COST = ("rows a pass", "ms a pass", "decode steps")


def heads(record: dict[str, Any]) -> tuple[str, ...]:
    """Names of the columns. Final answers do not say where an error is, so nothing is said of finding it."""
    return (*QUALITY, *(("AUC of whole drafts",) if outcomes(record["summary"]) else AT_THRESHOLD), *COST)


def outcomes(summary: Mapping[str, Any]) -> bool:
    """Whether only the drafts' final answers are labelled; older records do not say, and knew no such labels."""
    return bool(summary.get("labels") == "answers")


def cells(record: dict[str, Any]) -> list[list[str]]:
    """One list of cells a judge."""
    middle = _of_whole if outcomes(record["summary"]) else _at_threshold
    return [
        [name, *_areas_told(judge), *middle(judge), *_cost(judge)]
        for name, judge in record["summary"]["judges"].items()
    ]


def _areas_told(judge: dict[str, Any]) -> list[str]:
    if judge["auc"] is None:
        return [judge["path"], "-", "-"]
    less, more = judge["auc_difference_interval"]
    return [
        judge["path"],
        _area(judge["auc"], judge["auc_interval"]),
        f"{judge['auc_difference']:+.4f} [{less:+.4f}, {more:+.4f}]",
    ]


def _of_whole(judge: dict[str, Any]) -> list[str]:
    whole = judge["auc_whole"]
    return ["-" if whole is None else _area(whole[0], whole[1:])]


def _at_threshold(judge: dict[str, Any]) -> list[str]:
    at = judge["at"]
    return [
        f"{at['threshold']:.4g}",
        f"{100 * at['kept_share']:.1f} %",
        _percent(at["exact"], at["wrong_drafts"]),
        _percent(at["never_later"], at["wrong_drafts"]),
        "-" if judge.get("f1") is None else f"{100 * judge['f1']:.1f} %",  # older records have none
    ]


def _cost(judge: dict[str, Any]) -> list[str]:
    return [f"{judge['rows']:.0f}", f"{1000 * judge['pass_s']:.1f}", f"{judge['decode_steps']:.2f}"]


def _area(value: float, interval: Sequence[float]) -> str:
    low, high = interval
    return f"{value:.4f} [{low:.4f}, {high:.4f}]"


def _percent(hits: int, n: int) -> str:
    if not n:
        return "-"
    low, high = wilson(hits, n)
    return f"{100 * hits / n:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"


def note(record: dict[str, Any]) -> str:
    """What a reader needs to weigh the figures."""
    summary = record["summary"]
    told = (
        f"Tier: {tier(record)}. n = {summary['drafts']} drafts of {summary['draft_tokens']:.0f} tokens on average, "
        f"{summary['prefixes']} prefixes, {summary['wrong_prefixes']} of them wrong. "
    )
    if outcomes(summary):
        told += "Labels are of final answers: a prefix counts as right if its draft ends right. "
        told += f"Whole drafts: the {summary['ended']} that ended before the limit, others cannot be the answer. "
        told += "95 % intervals (bootstrap over drafts). "
    else:
        told += (
            f"Each judge at the threshold at which at most {100 * summary['kept_share']:.1f} % of the draft tokens "
            "stand; 95 % intervals (bootstrap over drafts; Wilson). Best F1: ProcessBench's, at the judge's own best "
            "threshold. "
        )
    return f"{told}A decode step takes {1000 * summary['decode_step_s']:.2f} ms; medians. {origin(record)}"


def markdown(record: dict[str, Any]) -> str:
    return document(record, grid(heads(record), cells(record)), note(record))
