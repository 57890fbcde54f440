"""The statistics of calibration: exact bounds against enumeration, and the goal's promise over many simulated fits."""

import dataclasses
import itertools
import math

import numpy as np
import pytest

pytest.importorskip("scipy")
pytest.importorskip("sklearn")

from parsedec.boundary import FirstFailure
from parsedec.calibration.decisions import decide, prefix_losses
from parsedec.calibration.fitting import fit_thresholds, prefix_losses_of
from parsedec.calibration.risk import Goal, Losses, check, conformal, drawn, fixed_sequence, lower_bound, upper_bound
from parsedec.calibration.samples import Sample, one_of_each
from parsedec.errors import ConfigError


def binomial(k, n, p):
    return math.comb(n, k) * p**k * (1 - p) ** (n - k)


@pytest.mark.parametrize(("errors", "of"), [(0, 1), (0, 59), (1, 60), (3, 100), (7, 7)])
def test_p_value_and_bounds_are_the_binomial_sums(errors, of):
    goal = Goal(risk=0.05)
    assert goal.p_value(errors, of) == pytest.approx(sum(binomial(k, of, 0.05) for k in range(errors + 1)))
    upper, lower = upper_bound(errors, of, 0.95), lower_bound(errors, of, 0.95)
    if errors < of:  # so few errors have exactly probability 5 % at the upper bound, so many at the lower one
        assert sum(binomial(k, of, upper) for k in range(errors + 1)) == pytest.approx(0.05)
    else:
        assert upper == 1
    if errors:
        assert sum(binomial(k, of, lower) for k in range(errors, of + 1)) == pytest.approx(0.05)
    else:
        assert lower == 0


@pytest.mark.parametrize("risk", [0.01, 0.05, 0.2])
def test_least_samples_are_the_first_that_can_show_the_goal(risk):
    goal = Goal(risk=risk)
    assert goal.p_value(0, goal.least) <= 0.05 < goal.p_value(0, goal.least - 1)


@pytest.mark.parametrize("method", ["fixed_sequence", "crc"])
@pytest.mark.parametrize("n", [2, 59, 80, 298])
def test_the_least_risk_is_what_so_many_samples_can_show(method, n):
    risk = Goal(of="requests", method=method).least_risk(n)
    assert Goal(risk=risk, of="requests", method=method).least <= n
    assert Goal(risk=risk - 0.002, of="requests", method=method).least > n
    assert Goal().least_risk(0) == 1.0


def test_the_share_of_samples_in_which_the_exact_bound_fails():
    """Enumerated: over all outcomes of 40 samples, the bound lies below the true share with at most 5 % probability."""
    for true in (0.01, 0.1, 0.3):
        fails = sum(binomial(k, 40, true) for k in range(41) if upper_bound(k, 40, 0.95) < true)
        assert fails <= 0.05


def drafts(rng, n, separable):
    """n drafts of four segments: a right one scores high, a wrong one lower or - now and then - as high."""
    samples = []
    for i in range(n):
        first = int(rng.geometric(0.12)) - 1
        right = tuple(k < first for k in range(4))
        scores = [rng.beta(8, 1) if good else rng.beta(1, separable) for good in right]
        samples.append(
            Sample(
                part="fit",
                id=str(i),
                tokens=tuple(range(8)),
                ended=True,
                cuts=(2, 4, 6, 8),
                scores=tuple(float(s) for s in scores),
                right=right,
                correct=all(right),
            )
        )
    return samples


POPULATION = drafts(np.random.default_rng(99), 3_000, 3)


def drawn_drafts(seed, n):
    """n drafts of the population, which therefore knows the true risk exactly."""
    some = np.random.default_rng(seed).integers(len(POPULATION), size=n)
    return [dataclasses.replace(POPULATION[i], id=f"{seed}/{k}") for k, i in enumerate(some)]


def true_risk(pair, of):
    """The share in the population the fitted drafts are drawn from."""
    losses = prefix_losses(POPULATION, decide(FirstFailure(), POPULATION, [pair]), of)
    return losses.errors[0] / losses.counts[0]


@pytest.mark.parametrize("of", ["kept", "requests"])
def test_fitted_thresholds_break_the_goal_as_rarely_as_promised(of):
    goal = Goal(risk=0.1, confidence=0.9, of=of, points=10)
    fits, broken, kept = 60, 0, 0
    for seed in range(fits):
        samples = drawn_drafts(seed, 150)
        fitted = fit_thresholds(goal, FirstFailure(), samples, prefix_losses_of(goal), seed)
        if fitted.pair is not None:
            kept += 1
            broken += true_risk(fitted.pair, of) > goal.risk
    assert kept >= fits / 2  # a method that never finds anything would pass the next line
    # 99 % quantile of Binomial(60, 0.1): a correct method breaks the goal in at most so many fits
    limit = next(k for k in range(fits) if sum(binomial(j, fits, 0.1) for j in range(k + 1)) >= 0.99)
    assert broken <= limit


def solutions(seed, problems, each, risk, shared):
    """`each` solutions of every problem, wrong with probability `risk`, which the judge does not see. Each has the
    verdict of its problem with probability `shared`, else one of its own."""
    rng, samples = np.random.default_rng(seed), []
    for p in range(problems):
        common = rng.random() < risk
        for k in range(each):
            right = not (common if rng.random() < shared else rng.random() < risk)
            samples.append(
                Sample(
                    part="fit",
                    id=f"{p}/{k}",
                    tokens=(1, 2),
                    ended=True,
                    cuts=(2,),
                    scores=(float(rng.uniform(0.5, 1)),),
                    right=(right,),
                    correct=right,
                    problem=f"{p}/0",
                )
            )
    return samples


def test_many_solutions_of_a_problem_are_no_more_evidence_than_one():
    """Every pair breaks the goal a little here, so every fit that finds one does. With eight solutions a problem
    counted as independent, that were a fifth of the fits and more."""
    goal, fits = Goal(risk=0.1, confidence=0.9, points=5), 120
    found = [
        fit_thresholds(goal, FirstFailure(), solutions(seed, 120, 8, 0.101, 0.9), prefix_losses_of(goal), seed)
        for seed in range(fits)
    ]
    # 99 % quantile of Binomial(120, 0.1): the false-alarm rate of this test is at most 1 %
    limit = next(k for k in range(fits) if sum(binomial(j, fits, 0.1) for j in range(k + 1)) >= 0.99)
    assert 0 < sum(one.pair is not None for one in found) <= limit
    assert all(one.explored + one.tested == 120 for one in found)  # no problem is on both sides


def test_one_of_each_problem_is_drawn_with_the_seed():
    samples = solutions(0, 40, 4, 0.5, 0.5)
    drawn_ones = one_of_each(samples, 0)
    assert [one.problem for one in drawn_ones] == [f"{p}/0" for p in range(40)]
    assert one_of_each(samples[::-1], 0) == drawn_ones[::-1]
    assert len({one.id.split("/")[1] for one in drawn_ones}) == 4  # not always the first
    assert one_of_each(samples, 1) != drawn_ones
    alone = [dataclasses.replace(one, problem=None) for one in samples]
    assert one_of_each(alone, 0) == alone


def test_conformal_control_bounds_the_expected_risk():
    goal = Goal(risk=0.1, of="requests", method="crc", points=30)
    risks = []
    for seed in range(40):
        samples = drawn_drafts(1000 + seed, 100)
        fitted = fit_thresholds(goal, FirstFailure(), samples, prefix_losses_of(goal), seed)
        risks.append(0.0 if fitted.pair is None else true_risk(fitted.pair, "requests"))
    spread = np.std(risks) / math.sqrt(len(risks))
    assert np.mean(risks) <= goal.risk + 3 * spread
    assert np.mean(risks) > goal.risk / 2  # it does use the room it has


def test_a_judge_that_separates_is_recognised_with_few_samples():
    """Right prefixes score 0.6 to 1, wrong ones 0: of 100 drafts, 80 tested, the goal of 5 % is shown."""
    goal = Goal(risk=0.05)
    perfect = [
        dataclasses.replace(one, scores=tuple(0.6 + 0.4 * s if right else 0.01 * s
                                              for s, right in zip(one.scores, one.right, strict=True)))
        for one in drawn_drafts(5, 100)
    ]  # fmt: skip
    fitted = fit_thresholds(goal, FirstFailure(), perfect, prefix_losses_of(goal), 0)
    assert fitted.pair is not None
    losses = prefix_losses(perfect, decide(FirstFailure(), perfect, [fitted.pair]), "kept")
    assert losses.errors[0] == 0
    assert losses.kept.sum() > 0.8 * sum(2 * one.first_wrong for one in perfect)


def losses(errors, counts):
    """Losses with so many errors and counted samples per pair, of 100."""
    wrong = np.array([[i < e for i in range(100)] for e in errors])
    counted = np.array([[i < c for i in range(100)] for c in counts])
    kept = np.cumsum(np.ones((len(errors), 100), int), axis=0)
    return Losses(wrong, counted, kept)


def test_the_sequence_ends_at_the_first_pair_that_fails():
    goal = Goal(risk=0.05)  # 59 without an error, 93 with one, show it
    assert fixed_sequence(goal, losses([0, 0, 9, 0], [60, 100, 100, 100]), [0, 1, 2, 3]).chosen == 1
    assert [t["pair"] for t in fixed_sequence(goal, losses([0, 9, 0], [60, 99, 99]), [0, 1, 2]).tested] == [0, 1]
    failed = fixed_sequence(goal, losses([0], [58]), [0])
    assert failed.chosen is None
    assert "0 errors in 58" in failed.reason
    assert fixed_sequence(goal, losses([0], [58]), []).chosen is None


def test_conformal_counts_one_error_more():
    goal = Goal(risk=0.05, of="requests", method="crc")
    fit = conformal(goal, losses([0, 4, 5], [100, 100, 100]), [0, 1, 2])  # 5 / 101 fits, 6 / 101 does not
    assert fit.chosen == 1
    assert conformal(goal, losses([5], [100]), [0]).chosen is None


def test_the_check_says_what_the_held_out_samples_show():
    goal = Goal(risk=0.05)
    assert [check(goal, e, 100)["verdict"] for e in (0, 5, 15)] == ["confirmed", "not contradicted", "violated"]
    assert check(goal, 0, 0) | {"verdict": ""} == {
        "errors": 0, "counted": 0, "risk": None, "interval": [0.0, 1.0], "upper": 1.0, "verdict": ""}  # fmt: skip


def test_a_drawn_share_does_not_depend_on_the_others():
    names = [f"problem {i}" for i in range(400)]
    some = drawn(names, 0.2, 0, "explore")
    assert list(drawn(names[:50], 0.2, 0, "explore")) == list(some[:50])
    assert 50 < some.sum() < 110
    assert list(some) != list(drawn(names, 0.2, 1, "explore"))


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"risk": 0}, "goal.risk=0"),
        ({"confidence": 1}, "goal.confidence=1"),
        ({"of": "drafts"}, "goal.of='drafts'"),
        ({"method": "crc"}, "goal.of=requests"),
        ({"points": 1}, "goal.points=1"),
    ],
)
def test_goals_that_make_no_sense_are_refused(setting, said):
    with pytest.raises(ConfigError, match=said):
        Goal(**setting)


def test_losses_of_every_pair_by_hand():
    """All outcomes of a draft of two segments, against the definition spelt out."""
    pairs = list(itertools.product((0.3, 0.7), (0.4, 0.8)))
    for right, scores, ended in itertools.product(
        [(True, True), (True, False), (False, False)], itertools.product((0.2, 0.5, 0.9), repeat=2), (True, False)
    ):
        one = Sample(
            part="fit", id="a", tokens=(1, 2, 3), ended=ended, cuts=(2, 3), scores=scores, right=right,
            correct=ended and all(right))  # fmt: skip
        found = prefix_losses([one], decide(FirstFailure(), [one], pairs), "kept")
        for row, (threshold, full) in enumerate(pairs):
            whole = scores[1] >= full
            segments = 2 if whole else 0 if scores[0] < threshold else 1 if scores[1] < threshold else 2
            wrong = not one.correct if whole and ended else not all(right[:segments])
            assert found.kept[row, 0] == (0, 2, 3)[segments]
            assert found.counted[row, 0] == (segments > 0)
            assert found.wrong[row, 0] == wrong
