"""From expectations to advice: the best arm, whether PARSE helps at all, and what limits it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from parsedec.advice.prediction import Expected, Predictor
from parsedec.calibration.figures import judged, separation
from parsedec.calibration.risk import upper_bound
from parsedec.experiment.intervals import with_interval

NEAR = 0.02  # among arms whose speeds differ by no more than this share, the one that spoils least is taken
CONFIDENCE = 0.95  # of the bound on what an arm spoils
FEWEST = 3  # with fewer right or fewer wrong samples, nothing is said about how well a judge separates


@dataclass(frozen=True, slots=True)
class Demands:
    """What PARSE has to reach to be advised.

    gain    least speed-up over the target and over the inner level alone
    spoilt  largest share of requests spoilt, of those that arms are chosen on (no promise for others: see
            `spoilt_at_most`), and largest drop in the share of right answers in the rehearsal
    """

    gain: float
    spoilt: float


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that limits PARSE here. Its kind is one of slow_draft, short_answers, refusing_judge, blind_judge,
    spoiling, less_accurate, inner_alone."""

    kind: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The advice.

    helps           whether PARSE is worth setting up
    recommended     the arm to run: PARSE, an inner level alone, or the target alone
    parse           the best arm of PARSE, whether or not it helps
    alone           the best inner level alone, which may be "none"
    settings        how many pairs of segmenter and thresholds `parse` was chosen among
    spoilt_at_most  the share of requests that `parse` may spoil on other problems (see the function of this name)
    """

    helps: bool
    recommended: Expected
    parse: Expected
    alone: Expected
    findings: tuple[Finding, ...]
    settings: int
    spoilt_at_most: float


def best_parse(arms: Sequence[Expected], demands: Demands) -> Expected:
    """The fastest arm that does not spoil too much; among arms about as fast, the one that spoils least, then the one
    with the highest threshold. Where all spoil too much, the one that spoils least.

    What it spoils is counted on the problems that chose it, and among many arms some are lucky: expect more on others.
    """
    fit = [arm for arm in arms if (arm.spoilt or 0.0) <= demands.spoilt]
    if not fit:
        least = min(arm.spoilt or 0.0 for arm in arms)
        fit = [arm for arm in arms if (arm.spoilt or 0.0) == least]
    fastest = max(arm.speedup for arm in fit)
    near = [arm for arm in fit if arm.speedup >= fastest * (1 - NEAR)]
    return max(near, key=lambda one: (-(one.spoilt or 0.0), (one.arm.thresholds or (0.0, 0.0))[0], one.speedup))


def luck_of_choice(arms: Sequence[Expected], predictor: Predictor, demands: Demands, draws: int = 200) -> float:
    """How many times faster the best arm looks on the problems it was chosen on than on others; at least 1.

    Each draw chooses the arm that is best on resampled problems, and divides its speed-up on them by its speed-up on
    all problems; the mean is returned (the bootstrap's estimate of optimism: Efron and Tibshirani, An Introduction to
    the Bootstrap, 1993, 17.6).
    """
    speedups = np.stack([predictor.resampled(arm.seconds) for arm in arms])[:, :draws]  # [arms, draws]
    spoils = np.array([arm.spoils for arm in arms])  # [arms, n]
    whole = {arm.arm: arm.speedup for arm in arms}
    found = []
    for chosen, speeds in zip(predictor.draws, speedups.T, strict=False):
        resampled = [
            replace(arm, speedup=float(speed), spoils=tuple(spoilt))
            for arm, speed, spoilt in zip(arms, speeds, spoils[:, chosen], strict=True)
        ]
        best = best_parse(resampled, demands)
        found.append(best.speedup / whole[best.arm])
    return max(1.0, float(np.mean(found)))


def spoilt_at_most(spoilt: int, n: int, settings: int) -> float:
    """The largest share of requests that the chosen arm may spoil on other problems, with 95 % confidence.

    It was chosen among `settings` settings, and spoilt `spoilt` of the `n` problems it was chosen on. Clopper and
    Pearson's bound for all settings at once (Bonferroni), and so for any one chosen; with thirty problems it is wide.
    """
    return upper_bound(spoilt, n, 1 - (1 - CONFIDENCE) / settings)


def separations(predictor: Predictor, segmenters: Sequence[str], seed: int) -> dict[str, dict[str, Any]]:
    """For each segmenter, how well the scores tell right from wrong (`calibration.figures.separation`)."""
    return {name: separation(judged(predictor.samples(name)), seed) for name in segmenters}


def blind(separates: dict[str, Any]) -> bool:
    """Whether the scores may separate no better than chance; False where there are too few samples to say so."""
    known = separates["auc"] is not None and min(separates["right"], separates["wrong"]) >= FEWEST
    return bool(known and separates["interval"][0] <= 0.5)


def falls(accuracy: Mapping[str, Any] | None, demands: Demands) -> bool:
    """Whether an arm's share of right answers is lower than the target's by more than is allowed; False if not scored.

    accuracy  `job.accuracy_change` of the arm
    """
    return accuracy is not None and accuracy["change"] < -demands.spoilt - 1e-9  # 0.95 - 1 is not quite -0.05


def conclude(
    predictor: Predictor,
    parse: Expected,
    alone: Expected,
    separates: dict[str, Any],
    demands: Demands,
    accuracy: Mapping[str, Any] | None = None,
    settings: int = 1,
) -> Verdict:
    """The advice, from the best arm of PARSE and the best inner level alone.

    separates  `separations` of the best arm's segmenter
    accuracy   `job.accuracy_change` of the best arm in the rehearsal, if it was scored
    settings   how many pairs of segmenter and thresholds it was chosen among
    """
    segmenter = parse.arm.segmenter
    assert segmenter is not None
    findings = []
    ideal, ceiling = predictor.ideal(segmenter), predictor.ceiling()
    plain = predictor.alone("none")
    kept, even = parse.kept_share or 0.0, predictor.break_even(segmenter, parse.arm.inner)
    if ceiling < 1.1 * demands.gain and predictor.own.mean() >= 2:  # with shorter answers there is no pace to compare
        findings.append(Finding("slow_draft", (
            f"The draft model is too slow: {ceiling:.2f} times the target's pace, which is the most that drafting can "
            "gain. Use a smaller one, or speed it up (draft.inner=…).")))  # fmt: skip
    elif ideal < demands.gain:
        findings.append(Finding("short_answers", (
            f"Answers are too short: {predictor.own.mean():.0f} tokens on average, and even with every draft kept "
            f"whole one judge pass and the draft model's reading of the prompt leave {ideal:.2f}x.")))  # fmt: skip
    elif parse.speedup < demands.gain and kept < max(even, 0.05):
        findings.append(Finding("refusing_judge", (
            f"The judge refuses too much: {100 * kept:.0f} % of the draft tokens stand, and drafting and judging cost "
            f"as much as {100 * even:.0f} % of them are worth. If the drafts are right, ask another way "
            "(judge.question=…) or train a judge (judge=probe).")))  # fmt: skip
    if blind(separates):
        low, high = separates["interval"]
        findings.append(Finding("blind_judge", (
            f"The judge does not separate: the area under its ROC curve is {separates['auc']:.2f} [{low:.2f}, "
            f"{high:.2f}], 0.5 being chance. A threshold then decides how much is kept, not what.")))  # fmt: skip
    if (parse.spoilt or 0.0) > demands.spoilt:
        findings.append(Finding("spoiling", (
            f"Every setting tried spoils more than {100 * demands.spoilt:.0f} % of the requests; the best of them "
            f"{100 * (parse.spoilt or 0.0):.0f} %.")))  # fmt: skip
    if accuracy is not None and falls(accuracy, demands):
        low, high = accuracy["interval"]
        findings.append(Finding("less_accurate", (
            f"Accuracy falls: run beside the target on {accuracy['requests']} of the problems, PARSE was right "
            f"{-100 * accuracy['change']:.0f} points less often [{100 * low:+.0f}, {100 * high:+.0f}], and "
            f"{100 * demands.spoilt:.0f} are allowed. More problems (short=…) would make this surer.")))  # fmt: skip
    if parse.speedup < alone.speedup * demands.gain and alone.arm.inner != "none" and alone.speedup >= demands.gain:
        findings.append(Finding("inner_alone", (
            f"inner={alone.arm.inner} alone is {alone.speedup:.2f} times as fast as the target, PARSE with the best "
            f"inner level {parse.speedup:.2f} times - and the former changes no token.")))  # fmt: skip
    beaten = {"blind_judge", "spoiling", "less_accurate", "inner_alone"} & {finding.kind for finding in findings}
    helps = parse.speedup >= demands.gain and not beaten
    other = alone if alone.speedup >= demands.gain else plain
    return Verdict(
        helps=helps, recommended=parse if helps else other, parse=parse, alone=alone, findings=tuple(findings),
        settings=settings, spoilt_at_most=spoilt_at_most(sum(parse.spoils), len(parse.spoils), settings),
    )  # fmt: skip


def headline(verdict: Verdict) -> str:
    """The advice in a sentence or two."""
    one = verdict.recommended
    low, high = one.interval
    said = f"{with_interval(one.speedup, low, high)} times the target's speed is to be expected."
    if verdict.helps:
        unsure = " The interval reaches below 1: take more prompts (n=…)." if low is not None and low < 1 else ""
        unsure = " There are too few prompts for an interval: take more (n=…)." if low is None else unsure
        return f"PARSE helps this pair: {said}{unsure}"
    if one.arm.inner != "none":
        return f"PARSE will not help this pair; inner={one.arm.inner} alone does: {said}"
    return "PARSE will not help this pair, and neither does any inner level tried: run the target alone."
