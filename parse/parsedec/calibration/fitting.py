"""Thresholds from judged samples: explore, test along a path, then check on problems that had no part in the choice."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

import numpy as np

from parsedec.boundary import DEFAULT_THRESHOLD, BoundaryRule
from parsedec.calibration import figures
from parsedec.calibration.decisions import Decisions, Pair, decide, kept_tokens, prefix_losses, thresholds
from parsedec.calibration.outcomes import Outcomes
from parsedec.calibration.risk import (
    Fit,
    Goal,
    Losses,
    check,
    choose_path,
    conformal,
    drawn,
    fixed_sequence,
    upper_bound,
)
from parsedec.calibration.samples import Sample, one_of_each
from parsedec.calibration.sources import Question, groups
from parsedec.errors import ConfigError
from parsedec.experiment.intervals import paired_change
from parsedec.experiment.summary import wilson

# (samples, decisions) -> what every pair of thresholds does to every sample
LossesOf = Callable[[Sequence[Sample], Decisions], Losses]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """The thresholds found, and how.

    pair      (threshold, full_threshold); None if none was shown to keep the goal
    path      the pairs that could be tested, from strict to lax; `fit` refers to them by index
    explored  how many problems the path was chosen on, with all their samples
    tested    how many problems the path was tested on, with one sample of each
    grid      the single thresholds tried
    """

    pair: Pair | None
    path: tuple[Pair, ...]
    fit: Fit
    explored: int
    tested: int
    grid: tuple[float, ...]


def fit_thresholds(goal: Goal, rule: BoundaryRule, samples: Sequence[Sample], losses_of: LossesOf, seed: int) -> Fitted:
    """The pair that keeps the most of the drafts among those shown to keep the goal.

    The statistics are about problems: each is either explored or tested as a whole, with one sample in the test
    (`one_of_each`).
    """
    if goal.method == "crc":
        samples = one_of_each(samples, seed)
        grid = thresholds(samples, goal.points)
        path = [(threshold, threshold) for threshold in reversed(grid)]
        fit = conformal(goal, losses_of(samples, decide(rule, samples, path)), range(len(path)))
        explored, others = 0, list(samples)
    else:
        aside = drawn([sample.group for sample in samples], goal.explore, seed, "explore")
        exploring = [sample for sample, out in zip(samples, aside, strict=True) if out]
        others = one_of_each([sample for sample, out in zip(samples, aside, strict=True) if not out], seed)
        grid = thresholds(exploring, goal.points)
        levels = list(product(range(len(grid)), range(len(grid))))
        pairs = [(grid[a], grid[b]) for a, b in levels]
        path = []
        if exploring and others:
            losses = losses_of(exploring, decide(rule, exploring, pairs))
            path = [pairs[p] for p in choose_path(goal, losses, levels, len(others))]
        tested = losses_of(others, decide(rule, others, path)) if path else _nothing(len(others))
        fit, explored = fixed_sequence(goal, tested, range(len(path))), problems_of(exploring)
    return Fitted(
        pair=None if fit.chosen is None else path[fit.chosen],
        path=tuple(path),
        fit=fit,
        explored=explored,
        tested=len(others),
        grid=tuple(grid),
    )


def problems_of(samples: Sequence[Sample]) -> int:
    """How many different problems the samples belong to."""
    return len({sample.group for sample in samples})


def prefix_losses_of(goal: Goal) -> LossesOf:
    return lambda samples, decisions: prefix_losses(samples, decisions, goal.of)


def report(
    goal: Goal,
    rule: BoundaryRule,
    fitted: Fitted,
    parts: dict[str, list[Sample]],
    losses_of: LossesOf,
    outcomes: Outcomes | None,
    seed: int,
) -> dict[str, Any]:
    """Everything a reader of the record needs: the goal, what was found, whether it holds on the check, and figures.

    Figures that need a threshold use the fitted ones or, if there are none, those in force without this run. Bounds and
    answers count one sample of each problem, as the fit does; figures about the judge count all samples.
    """
    held = parts["check"]
    single = {name: one_of_each(samples, seed) for name, samples in parts.items()}
    pair = fitted.pair or (rule.floor, _full_in_force(rule))
    decided = decide(rule, single["check"], [pair])
    losses = losses_of(single["check"], decided)
    complete = figures.judged_by_problem(held, complete=True)
    found: dict[str, Any] = {
        "goal": asdict(goal),
        "counts": {
            "fit": len(parts["fit"]),
            "check": len(held),
            "fit_problems": len(single["fit"]),
            "explored": fitted.explored,
            "tested": fitted.tested,
            "check_problems": len(single["check"]),
        },
        "fitted": _found(goal, fitted),
        "used": {"threshold": pair[0], "full_threshold": pair[1], "fitted": fitted.pair is not None},
        "path": [step | dict(zip(("threshold", "full_threshold"), fitted.path[step["pair"]], strict=True))
                 for step in fitted.fit.tested],
        "check": check(goal, int(losses.errors[0]), int(losses.counts[0]))
        | figures.kept_share(single["check"], rule, pair),
        "complete": {
            "separation": figures.separation(complete, seed),
            "reliability": figures.reliability(complete),
            "mistakes": figures.mistakes(complete, pair[1]),
        },
    }  # fmt: skip
    if outcomes is not None:
        return found | {"outcome": outcome_figures(single["check"], decided, outcomes)}
    prefixes = figures.judged_by_problem(held)
    return found | {
        "prefixes": {
            "separation": figures.separation(prefixes, seed),
            "reliability": figures.reliability(prefixes),
            "mistakes": figures.mistakes(prefixes, pair[0]),
        },
        "localisation": figures.localisation(held, _at(rule, pair)),
        "localisation_best": figures.best_localisation(parts["fit"], held, rule, fitted.grid),
        "by_position": figures.by_position(held, pair[0]),
        "sweep": {name: figures.sweep(some, rule, goal, fitted.grid) for name, some in single.items()},
    }


def outcome_figures(samples: Sequence[Sample], decisions: Decisions, outcomes: Outcomes) -> dict[str, Any]:
    """Accuracy of the target alone and with the kept prefixes, on the same problems, one sample of each."""
    own, ours = outcomes.own(samples), outcomes.answers(samples, decisions)[0]
    spoilt, gained, n = int((own & ~ours).sum()), int((~own & ours).sum()), len(samples)
    return {
        "target_accuracy": {"count": int(own.sum()), "share": float(own.mean()), "interval": wilson(int(own.sum()), n)},
        "accuracy": {"count": int(ours.sum()), "share": float(ours.mean()), "interval": wilson(int(ours.sum()), n)},
        "change": {"share": (gained - spoilt) / n, "interval": list(paired_change(gained, spoilt, n))},
        "spoilt": spoilt,
        "gained": gained,
        "kept_tokens": int(kept_tokens(samples, decisions).sum()),
    }


def require_possible(goal: Goal, questions: Sequence[Question], seed: int, *, prefixes: bool) -> None:
    """Raise ConfigError, before anything is judged, for a goal that cannot be shown whatever the scores are."""
    if goal.method == "crc" and not prefixes:
        raise ConfigError(
            "goal.method=crc needs errors that only appear as thresholds fall; whether a request is spoilt is not such "
            "an error. Use goal.method=fixed_sequence with labels=answers."
        )
    every = groups([question.problem for question in questions])
    fit = sorted({name for name, one in zip(every, questions, strict=True) if one.part == "fit"})
    explored = 0 if goal.method == "crc" else int(drawn(fit, goal.explore, seed, "explore").sum())
    if (tested := len(fit) - explored) < goal.least:
        need = math.ceil(1.1 * goal.least * len(fit) / max(1, tested))  # 1.1: chance decides how many only explore
        total = math.ceil(need * len(set(every)) / len(fit))
        raise ConfigError(
            f"{tested} problems would be tested ({len(fit)} are to fit, of which {explored} only explore, and "
            f"{len(set(every)) - len(fit)} to check), but goal.risk={goal.risk} with goal.confidence={goal.confidence} "
            f"takes {goal.least} even if no error is made: no threshold could be shown to keep it. Label about {need} "
            f"problems to fit ({total} where a share of them is held out to check), or allow "
            f"goal.risk={goal.least_risk(tested)} or more."
        )


def require_usable(parts: dict[str, list[Sample]]) -> None:
    """Raise ConfigError if no sample of a part could be judged."""
    empty = [name for name, samples in parts.items() if not samples]
    if empty:
        raise ConfigError(f"no sample of part {empty[0]!r} could be judged; the record says why, sample by sample.")


def _found(goal: Goal, fitted: Fitted) -> dict[str, Any]:
    if fitted.pair is None:
        return {"threshold": None, "full_threshold": None, "reason": fitted.fit.reason, "least_samples": goal.least}
    step = next(step for step in fitted.fit.tested if step["pair"] == fitted.fit.chosen)
    return {
        "threshold": fitted.pair[0],
        "full_threshold": fitted.pair[1],
        **{key: value for key, value in step.items() if key != "pair"},
        "upper": upper_bound(step["errors"], step["counted"], goal.confidence),
    }


def _nothing(samples: int) -> Losses:
    none = np.zeros((0, samples), bool)
    return Losses(none, none, none.astype(int))


def _at(rule: BoundaryRule, pair: Pair) -> BoundaryRule:
    return replace(rule, threshold=pair[0], full_threshold=pair[1])


def _full_in_force(rule: BoundaryRule) -> float:
    return DEFAULT_THRESHOLD if rule.full_threshold is None else rule.full_threshold
