"""What arms would cost and keep, predicted from measurements: the engine's own boundary rule decides again each time.

    seconds = prefill and all else the target does alone + draft + judge pass + what the target still writes

with the cost model of `experiment.analysis`. After a kept prefix of c tokens the target is expected to write what is
left of its own answer's T tokens, T - c, times a factor measured on a few real continuations. An inner level takes a
start and a pace for them, both in units of the target's own seconds per token on the same problem, so that spells in
which the machine is busier cancel out.

Shapes in this file:  n problems, R resamples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from parsedec.advice.trial import Trial
from parsedec.boundary import BoundaryRule
from parsedec.calibration.decisions import Pair, decide, kept_tokens, prefix_losses
from parsedec.calibration.samples import Sample
from parsedec.experiment.analysis import expected_seconds
from parsedec.experiment.intervals import jackknifed
from parsedec.experiment.summary import compare, resampled, summarise

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """The cost of an inner level, in tokens of the target alone: start + pace * m for m tokens after the first, which
    comes with the prefill. tau: tokens per verified tree."""

    start: float
    pace: float
    tau: float

    def tokens(self, written: Floats) -> Floats:
        """The cost of answers of `written` tokens [n], in tokens of the target alone [n]."""
        return np.where(written > 1, self.start + self.pace * (written - 1), 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmChoice:
    """One way to set up the stack. Without a segmenter it is the inner level alone."""

    inner: str
    segmenter: str | None = None
    thresholds: Pair | None = None
    loop: str = "once"

    @property
    def drafts(self) -> bool:
        return self.segmenter is not None

    @property
    def label(self) -> str:
        if self.segmenter is None or self.thresholds is None:
            return f"{self.inner} alone" if self.inner != "none" else "target alone"
        return f"{self.segmenter}, {self.thresholds[0]:.3g}, {self.inner}, {self.loop}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """What is to be expected of an arm.

    speedup      the target's seconds over the arm's, with a 95 % interval (`jackknifed` over problems)
    seconds      of the arm by problem [n], as predicted
    kept_share   share of the drafts' tokens that is kept, end tokens included
    spoils       whether something wrong is kept, by problem [n]; empty without drafts
    parts        mean seconds of each phase
    rehearsed    on how many problems the arm was run; 0 if speedup, kept_share and parts are predicted from costs
    """

    arm: ArmChoice
    speedup: float
    interval: tuple[float | None, float | None]
    seconds: tuple[float, ...]
    kept_share: float | None = None
    spoils: tuple[bool, ...] = ()
    parts: Mapping[str, float]
    rehearsed: int = 0

    @property
    def spoilt(self) -> float | None:
        """Share of requests in which something wrong is kept; None without drafts."""
        return sum(self.spoils) / len(self.spoils) if self.spoils else None


def fit_pace(trials: Sequence[Trial], inner: str) -> Pace:
    """An inner level's pace: least squares over its runs, each in units of the target's own pace on its problem.

    Returns the target's pace where no answer has two tokens: there is then none to measure, nor any need of one.
    """
    runs = [(run, trial.token_s) for trial in trials for run in trial.decoded.get(inner, ())]
    useful = [(run.tokens - 1.0, run.seconds / token_s) for run, token_s in runs if run.tokens > 1 and token_s > 0]
    if not useful:
        return Pace(start=0.0, pace=1.0, tau=1.0)
    m, cost = np.array(useful).T
    start, pace = np.linalg.lstsq(np.stack([np.ones_like(m), m], 1), cost, rcond=None)[0]
    if start < 0 or pace <= 0 or len(set(m)) == 1:  # noise, or a single length: fit a line through the origin
        start, pace = 0.0, float(cost.sum() / m.sum())
    calls = sum(run.calls for run, _ in runs)
    return Pace(start=float(start), pace=float(pace), tau=float(m.sum() / calls) if calls else 1.0)


def remaining_factor(trials: Sequence[Trial], limit: int) -> float:
    """Tokens that the target really wrote after a prefix, over those its own answer has left; 1 if none was run."""
    pairs = [
        (run.tokens, _left(trial.tokens, run.prefix, limit))
        for trial in trials
        for run in trial.decoded.get("none", ())
        if run.prefix
    ]
    return sum(real for real, _ in pairs) / sum(left for _, left in pairs) if pairs else 1.0


def _left(own: float, prefix: float, limit: int) -> float:
    return float(min(max(1, own - prefix), max(0, limit - prefix)))


class Predictor:
    """Predicts arms on the problems measured. Raises ValueError if none could be.

    rule   the boundary rule, whose thresholds are replaced by an arm's
    limit  the most tokens an answer may have
    """

    def __init__(self, trials: Sequence[Trial], rule: BoundaryRule, limit: int, seed: int = 0) -> None:
        self.trials = [trial for trial in trials if trial.error is None and trial.tokens]
        if not self.trials:
            raise ValueError("nothing was measured")
        self.rule = rule
        self.limit = limit
        self.factor = remaining_factor(self.trials, limit)
        inners = {name for trial in self.trials for name in trial.decoded}
        self.paces = {name: fit_pace(self.trials, name) for name in sorted(inners)}
        self.draws = resampled(len(self.trials), seed)  # [R, n]
        self.token_s = np.array([trial.token_s for trial in self.trials])
        self.own = np.array([trial.tokens for trial in self.trials], dtype=float)
        self.prefill = np.array([trial.wall_s - trial.decode_s for trial in self.trials])
        self.target = np.array([trial.wall_s for trial in self.trials])
        self.draft = np.array([trial.draft_s for trial in self.trials])
        self.drafted = np.array([trial.draft_tokens for trial in self.trials], dtype=float)
        self.ended = np.array([trial.ended for trial in self.trials])

    @property
    def prefixes(self) -> bool:
        """Whether it is known which prefixes are right."""
        return all(seen.right is not None for trial in self.trials for seen in trial.judged.values())

    def samples(self, segmenter: str) -> list[Sample]:
        return [trial.sample(segmenter, prefixes=self.prefixes) for trial in self.trials]

    def alone(self, inner: str) -> Expected:
        """What to expect of an inner level without an outer one."""
        nothing = np.zeros_like(self.target)
        written = self.paces[inner].tokens(self.own)
        seconds = self.target if inner == "none" else expected_seconds(
            self.prefill, nothing, nothing, written, self.token_s)  # fmt: skip
        return self._expected(ArmChoice(inner=inner), seconds, nothing, nothing)

    def parse(self, segmenter: str, pairs: Sequence[Pair], inners: Sequence[str]) -> list[Expected]:
        """What to expect of PARSE with one segmenter, for every pair of thresholds and every inner level."""
        samples = self.samples(segmenter)
        judge = np.array([trial.judged[segmenter].seconds for trial in self.trials])
        decisions = decide(self.rule, samples, pairs)
        kept = kept_tokens(samples, decisions)
        found = []
        for p, pair in enumerate(pairs):
            closed = decisions.whole[p] & self.ended
            written = self.written(kept[p], closed)
            spoilt = self._spoilt(samples, decisions.whole[p], pair)
            share = float((kept[p] + closed).sum() / max(1.0, (self.drafted + self.ended).sum()))
            for inner in inners:
                seconds = expected_seconds(
                    self.prefill, self.draft, judge, self.paces[inner].tokens(written), self.token_s
                )
                arm = ArmChoice(inner=inner, segmenter=segmenter, thresholds=pair)
                one = self._expected(arm, seconds, self.draft, judge)
                found.append(replace(one, kept_share=share, spoils=tuple(map(bool, spoilt))))
        return found

    def written(self, kept: NDArray[Any], closed: NDArray[np.bool_]) -> Floats:
        """Tokens that the target writes after the kept prefixes [n]; 0 where a closed draft is itself the answer."""
        left = np.clip(self.own - kept, 1.0, None) * self.factor
        return np.where(closed, 0.0, np.clip(np.maximum(left, 1.0), 0.0, self.limit - kept))

    def ideal(self, segmenter: str) -> float:
        """The speed-up if every draft were kept whole: only prompt, draft and judge pass would then cost time."""
        judge = np.array([trial.judged[segmenter].seconds for trial in self.trials])
        return float(self.target.sum() / (self.prefill + self.draft + judge).sum())

    def ceiling(self) -> float:
        """The target's seconds per token over the draft model's."""
        return float(self.token_s.mean() / (self.draft.sum() / max(1.0, (self.drafted + self.ended).sum())))

    def break_even(self, segmenter: str, inner: str) -> float:
        """The share of a draft that must be kept to pay for drafting and judging; infinite if drafts save no time."""
        judge = np.array([trial.judged[segmenter].seconds for trial in self.trials])
        worth = (self.drafted * self.paces[inner].pace * self.token_s).sum()
        return float((self.draft + judge).sum() / worth) if worth else np.inf

    def resampled(self, seconds: Sequence[float]) -> Floats:
        """Speed-ups on resampled problems [R] of an arm that takes `seconds` [n]."""
        ratios: Floats = self.target[self.draws].sum(1) / np.asarray(seconds)[self.draws].sum(1)
        return ratios

    def _spoilt(self, samples: Sequence[Sample], whole: NDArray[np.bool_], pair: Pair) -> NDArray[np.bool_]:
        """Whether something wrong is kept where the target alone is right [n]. Where only final answers are known:
        whether a wrong draft replaces a right answer."""
        own = np.array([trial.own_correct for trial in self.trials])
        correct = np.array([sample.correct for sample in samples])
        if not self.prefixes:
            return np.asarray(whole & ~correct & own)
        wrong = prefix_losses(samples, decide(self.rule, samples, [pair]), "requests").wrong[0]
        return np.asarray(wrong & own)

    def _expected(self, arm: ArmChoice, seconds: Floats, draft: Floats, judge: Floats) -> Expected:
        parts = {"prefill": self.prefill, "draft": draft, "judge": judge}
        parts["decode"] = seconds - self.prefill - draft - judge
        speedup, low, high = jackknifed(np.stack([self.target, seconds], axis=1), lambda sums: sums[0] / sums[1])
        return Expected(
            arm=arm,
            speedup=speedup,
            interval=(low, high),
            seconds=tuple(float(s) for s in seconds),
            parts={name: float(part.mean()) for name, part in parts.items()},
        )


def observed(
    one: Expected, arm: ArmChoice, target: Sequence[dict[str, Any]], own: Sequence[dict[str, Any]], luck: float = 1.0
) -> Expected:
    """What to expect of an arm that was run beside the target: what was measured, its speed-up divided by `luck`.

    one          what was predicted for it, or for the arm it varies; returned if both answered no problem in common
    target, own  requests of the target alone, and of the arm
    luck         how many times faster it looks for having been chosen on these problems (`verdict.luck_of_choice`)
    """
    found, summary = compare(target, own), summarise(own)
    if found is None or found["time_ratio"] is None:
        return replace(one, arm=arm)
    answered = sum(1 for request in own if request.get("result"))
    low, high = (None if end is None else end / luck for end in (found["time_ratio_low"], found["time_ratio_high"]))
    return replace(
        one,
        arm=arm,
        speedup=found["time_ratio"] / luck,
        interval=(low, high),
        kept_share=summary["kept_share"],
        parts={phase: summary[f"{phase}_s"] / answered for phase in one.parts},
        rehearsed=found["problems"],
    )
