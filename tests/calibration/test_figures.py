"""The figures of a calibration against examples worked out by hand."""

from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("scipy")
pytest.importorskip("sklearn")

from sklearn.metrics import roc_auc_score

from parsedec.boundary import FirstFailure
from parsedec.calibration import figures
from parsedec.calibration.decisions import decide, thresholds
from parsedec.calibration.fitting import outcome_figures
from parsedec.calibration.outcomes import Outcomes
from parsedec.calibration.risk import Goal
from parsedec.calibration.samples import Sample, right_prefixes
from parsedec.experiment.summary import auc
from parsedec.tasks.base import Score
from parsedec.text.spelling import Draft


def sample(name, right, scores, **more):
    n = len(scores)
    return Sample(
        part="check", id=name, tokens=tuple(range(n)), ended=True, cuts=tuple(range(1, n + 1)), scores=tuple(scores),
        right=tuple(right), **{"correct": all(right), **more})  # fmt: skip


FOUR = [
    sample("exact", [True, False, False], [0.9, 0.2, 0.1]),
    sample("early", [True, False, False], [0.3, 0.2, 0.1]),
    sample("late", [True, False, False], [0.9, 0.8, 0.1]),
    sample("sound", [True, True], [0.9, 0.6]),
]


def test_localisation_and_f1_as_processbench_defines_them():
    found = figures.localisation(FOUR, FirstFailure(threshold=0.5))
    assert (found["exact"]["count"], found["exact"]["of"]) == (1, 3)
    assert (found["never_later"]["count"], found["never_later"]["of"]) == (2, 3)
    assert (found["untouched"]["count"], found["untouched"]["of"]) == (1, 1)
    assert found["f1"] == pytest.approx(2 * (1 / 3) * 1 / (1 / 3 + 1))
    assert figures.localisation(FOUR, FirstFailure(threshold=0.7))["f1"] == 0  # the sound one is cut, too
    assert figures.localisation(FOUR[:3], FirstFailure(threshold=0.5))["f1"] is None
    best = figures.best_localisation(FOUR, FOUR, FirstFailure(), [0.05, 0.25, 0.5, 0.95])
    # at 0.25 the early one is found exactly, too: 2 of 3
    assert (best["threshold"], best["f1"]) == (0.25, pytest.approx(2 * (2 / 3) / (2 / 3 + 1)))
    assert best["f1_on_fit"] == best["f1"]


def test_separation_counts_pairs():
    # scores right 0.9 0.3 0.9 0.9 0.6; wrong 0.2 0.1 0.2 0.1 0.8 0.1: of 30 pairs the 0.8 beats 0.3 and 0.6
    found = figures.separation(figures.judged(FOUR), seed=0)
    assert (found["right"], found["wrong"]) == (5, 6)
    assert found["auc"] == pytest.approx(28 / 30)
    low, high = found["interval"]
    assert low <= found["auc"] <= high
    assert figures.separation(figures.judged([FOUR[3]]), seed=0)["auc"] is None


def test_drafts_of_a_problem_are_resampled_together():
    """Four copies of every draft show no more than one of each: the interval of the area is the same."""
    copies = [replace(one, id=f"{one.id}/{k}", problem=one.id) for one in FOUR for k in range(4)]
    once = figures.separation(figures.judged(FOUR), seed=0)
    again = figures.separation(figures.judged_by_problem(copies), seed=0)
    assert (again["auc"], again["interval"]) == (once["auc"], pytest.approx(once["interval"]))
    assert figures.judged_by_problem(FOUR) == figures.judged(FOUR)


def test_the_area_is_that_under_the_curve():
    random = np.random.default_rng(0)
    for digits in (1, 9):  # with many ties, and with none
        scores, right = random.random(50).round(digits), random.random(50) < 0.5
        assert auc(scores, right) == pytest.approx(roc_auc_score(right, scores), abs=1e-12)


def test_reliability_bins():
    found = figures.reliability([[(0.1, False), (0.15, True)], [(0.95, True), (1.0, True)]])
    assert [(row["low"], row["count"], row["right"]) for row in found["bins"]] == [(0.1, 2, 0.5), (0.9, 2, 1.0)]
    assert found["ece"] == pytest.approx((2 * abs(0.125 - 0.5) + 2 * abs(0.975 - 1)) / 4)


def test_mistakes_and_the_heat_map():
    found = figures.mistakes(figures.judged(FOUR), 0.5)
    assert (found["false_accepts"]["count"], found["false_accepts"]["of"]) == (1, 6)
    assert (found["false_refusals"]["count"], found["false_refusals"]["of"]) == (1, 5)
    heat = figures.by_position(FOUR, 0.5)
    assert [row["false_accepts"]["count"] for row in heat["positions"]] == [0, 1, 0]
    assert [row["false_refusals"]["count"] for row in heat["positions"]] == [1, 0, 0]
    assert heat["right"][0][9] == 3  # 0.9 three times
    assert [sum(row) for row in heat["wrong"]] == [0, 3, 3]


def test_sweep_counts_what_every_threshold_keeps():
    goal = Goal(risk=0.1)
    rows = {row["threshold"]: row for row in figures.sweep(FOUR, FirstFailure(), goal, [0.5, 0.85, 1.0])}
    assert rows[0.5]["kept_share"] == pytest.approx((1 + 0 + 2 + 2) / 11)
    assert (rows[0.5]["errors"], rows[0.5]["counted"], rows[0.5]["accepted_whole"]) == (1, 3, 1)
    assert (rows[0.85]["errors"], rows[0.85]["counted"]) == (0, 3)
    assert (rows[1.0]["kept_share"], rows[1.0]["upper"]) == (0, 1.0)


def test_thresholds_shut_wrong_prefixes_out():
    found = thresholds(FOUR, 40)
    assert found == sorted(found)
    assert any(0.8 < threshold < 0.9 for threshold in found)
    assert found[-1] == 1.0


def test_prefixes_of_lines_and_parts_of_lines():
    text = "a b\nc d\ne"
    draft = Draft(tuple(range(len(text))), text, tuple(range(1, len(text) + 1)), ended=True)
    wrong = Score(False, "", first_wrong_line=1, error_at=6)  # "c " still begins a right line, "c d" is wrong
    assert right_prefixes(draft, [2, 3, 6, 7, 8, 9], wrong) == (True, True, True, False, False, False)
    assert right_prefixes(draft, [3, 9], Score(True, "")) == (True, True)


def test_outcomes_ask_once_and_compare_with_the_target_alone():
    a, b = (
        Sample(part="fit", id=name, tokens=(1, 2), ended=True, cuts=(1, 2), scores=(0.9, whole), correct=False)
        for name, whole in (("a", 0.95), ("b", 0.2))
    )
    asked = []

    def ask(sample, tokens):
        asked.append((sample.id, tokens))
        return tokens == 0  # the target alone is right; behind a kept token it is not

    outcomes = Outcomes({}, ask)
    decisions = decide(FirstFailure(), [a, b], [(0.5, 0.9), (0.95, 0.99)])
    assert outcomes.missing([a, b], decisions) == 3
    losses = outcomes.losses([a, b], decisions, "requests")
    assert losses.wrong.tolist() == [[True, True], [False, False]]  # a whole wrong draft, a spoilt prefix; nothing kept
    assert sorted(asked) == [("a", 0), ("b", 0), ("b", 1)]
    assert outcomes.missing([a, b], decisions) == 0


def test_an_accuracy_that_did_not_change_on_few_problems_may_still_change_on_others():
    samples = [
        Sample(part="check", id=str(i), tokens=(1, 2), ended=True, cuts=(1, 2), scores=(0.9, 0.95), correct=True)
        for i in range(20)
    ]
    outcomes = Outcomes({}, lambda sample, tokens: True)
    found = outcome_figures(samples, decide(FirstFailure(), samples, [(0.5, 0.9)]), outcomes)
    assert (found["spoilt"], found["gained"], found["change"]["share"]) == (0, 0, 0.0)
    assert found["change"]["interval"] == pytest.approx([-0.161, 0.161], abs=1e-3)  # z^2 / (n + z^2)
