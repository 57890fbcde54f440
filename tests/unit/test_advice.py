"""The advisor's predictions against a synthetic engine whose costs are known exactly, and what it says of bad pairs."""

import json
import random
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("sklearn")

from parsedec.advice.job import accuracy_change
from parsedec.advice.prediction import ArmChoice, Expected, Predictor, fit_pace, observed, remaining_factor
from parsedec.advice.report import CHECK_HEADS, check_rows, rehearsed_accuracy
from parsedec.advice.trial import Decoding, Pass, Trial
from parsedec.advice.verdict import (
    Demands,
    best_parse,
    blind,
    conclude,
    falls,
    headline,
    luck_of_choice,
    separations,
    spoilt_at_most,
)
from parsedec.boundary import FirstFailure
from parsedec.experiment.record import to_json
from parsedec.types import Counters, PhaseTimes, Result, StopReason

DEMANDS = Demands(gain=1.05, spoilt=0.05)
LIMIT = 1000
N = 40


class Engine:
    """Exact costs. The target takes `target` s a token and `prefill` s a prompt, the draft model `draft` s a token and
    a prompt of its own, the judge `judge` s a pass; inner levels take a start and a pace, in target tokens."""

    def __init__(self, *, target=0.01, draft=0.002, judge=0.03, prefill=0.02, length=100, inner=(2.0, 0.5),
                 scores=None, wrong=0.3, seed=0):  # fmt: skip
        self.draw = random.Random(seed)
        self.target, self.draft, self.judge, self.prefill, self.length = target, draft, judge, prefill, length
        self.inners = {"none": (0.0, 1.0), "fast": inner}
        self.scores = scores or (lambda right: 0.95 if right else 0.2)
        self.wrong = wrong

    def decoding(self, inner, tokens):
        start, pace = self.inners[inner]
        return self.target * (start + pace * (tokens - 1)) if tokens > 1 else 0.0

    def trial(self, i):
        tokens = self.draw.randint(self.length * 4 // 5, self.length)
        cuts = tuple(sorted({*range(10, tokens - 1, 10), tokens - 1}))
        bad = self.draw.randrange(len(cuts)) if self.draw.random() < self.wrong else len(cuts)
        right = tuple(k < bad for k in range(len(cuts)))
        seen = Pass(cuts=cuts, scores=tuple(self.scores(r) for r in right), rows=100, seconds=self.judge, right=right)
        prefix = cuts[len(cuts) // 2] if len(cuts) > 1 else 0
        runs = {
            name: tuple(Decoding(prefix=p, tokens=tokens - p, seconds=self.decoding(name, tokens - p), calls=tokens)
                        for p in {0, prefix})
            for name in self.inners
        }  # fmt: skip
        return Trial(
            id=str(i), tokens=tokens, prefill_s=self.prefill, decode_s=self.decoding("none", tokens),
            wall_s=self.prefill + self.decoding("none", tokens), own_correct=True, draft_tokens=tokens - 1, ended=True,
            draft_s=self.draft * (tokens + 4), draft_correct=all(right), judged={"lines": seen}, decoded=runs,
        )  # fmt: skip

    def seconds(self, trial, threshold, inner):
        """What PARSE takes, step by step."""
        spent = self.prefill + trial.draft_s + self.judge
        kept = 0
        for cut, score in zip(trial.judged["lines"].cuts, trial.judged["lines"].scores, strict=True):
            if score < threshold:
                return spent + self.decoding(inner, trial.tokens - kept), kept
            kept = cut
        return spent, kept + 1


def advice(engine, n=N, accuracy=None, **changed):
    trials = [engine.trial(i) for i in range(n)]
    predictor = Predictor(trials, FirstFailure(threshold=0.9), LIMIT)
    arms = predictor.parse("lines", [(t, t) for t in (0.5, 0.9)], ["none", "fast"])
    alone = max((predictor.alone(name) for name in ("none", "fast")), key=lambda one: one.speedup)
    separates = separations(predictor, ["lines"], 0)["lines"] | changed
    best = best_parse(arms, DEMANDS)
    return conclude(predictor, best, alone, separates, DEMANDS, accuracy), predictor


def kinds(verdict):
    return {finding.kind for finding in verdict.findings}


@pytest.mark.parametrize("inner", ["none", "fast"])
@pytest.mark.parametrize("threshold", [0.1, 0.5, 0.99])
def test_prediction_is_what_the_synthetic_engine_takes(threshold, inner):
    engine = Engine()
    trials = [engine.trial(i) for i in range(N)]
    (found,) = Predictor(trials, FirstFailure(), LIMIT).parse("lines", [(threshold, threshold)], [inner])
    real = [engine.seconds(trial, threshold, inner) for trial in trials]
    assert found.seconds == pytest.approx([seconds for seconds, _ in real], rel=1e-6)
    assert found.speedup == pytest.approx(sum(t.wall_s for t in trials) / sum(seconds for seconds, _ in real))
    assert found.kept_share == pytest.approx(sum(k for _, k in real) / sum(t.draft_tokens + 1 for t in trials))
    assert sum(found.parts.values()) == pytest.approx(np.mean(found.seconds))
    assert found.interval[0] <= found.speedup <= found.interval[1]
    wrong = sum(not t.draft_correct for t in trials) / N
    assert found.spoilt == pytest.approx(wrong if threshold == 0.1 else 0.0)


def test_inner_levels_alone_and_their_paces():
    engine = Engine(inner=(3.0, 0.4))
    trials = [engine.trial(i) for i in range(N)]
    predictor = Predictor(trials, FirstFailure(), LIMIT)
    pace = fit_pace(trials, "fast")
    assert (pace.start, pace.pace) == pytest.approx((3.0, 0.4))
    taken = sum(engine.prefill + engine.decoding("fast", t.tokens) for t in trials)
    assert predictor.alone("fast").speedup == pytest.approx(sum(t.wall_s for t in trials) / taken)
    assert predictor.alone("none").speedup == 1.0
    assert remaining_factor(trials, LIMIT) == pytest.approx(1.0)


def test_a_limit_bounds_what_is_left_to_write():
    predictor = Predictor([Engine(length=50).trial(0)], FirstFailure(), limit=50)
    predictor.factor = 3.0  # as if the target wrote on for long behind a draft
    assert predictor.written(np.array([10]), np.array([False])).tolist() == [40.0]
    assert predictor.written(np.array([50]), np.array([False])).tolist() == [0.0]
    assert predictor.written(np.array([10]), np.array([True])).tolist() == [0.0]


def request(i, seconds, **counters):
    """As a record holds it, with what expectations read."""
    times = {"prefill_s": 0.1, "draft_s": 0.2, "judge_s": 0.3, "decode_s": seconds - 0.6, "wall_s": seconds}
    result = Result(
        text="", tokens=(1, 2), prompt_tokens=5, stop=StopReason.END_TOKEN, spans=(), rounds=(),
        counters=Counters(**counters), times=PhaseTimes(**times, first_token_s=0.1),
    )  # fmt: skip
    return {"id": str(i), "correct": True, "result": to_json(result), "error": None}


def test_an_arm_that_was_run_is_expected_to_do_what_it_did():
    engine = Engine()
    predictor = Predictor([engine.trial(i) for i in range(N)], FirstFailure(), LIMIT)
    (once,) = predictor.parse("lines", [(0.5, 0.5)], ["none"])
    target = [request(i, 2.0 + i % 3) for i in range(9)]
    own = [request(i, 1.0 + i % 2, draft_tokens=4, kept_draft_tokens=3) for i in range(1, 9)]
    rounds = ArmChoice(inner="none", segmenter="lines", loop="rounds")
    seen = observed(once, rounds, target, own, luck=1.25)
    ratio = sum(2.0 + i % 3 for i in range(1, 9)) / sum(1.0 + i % 2 for i in range(1, 9))
    assert seen.speedup == pytest.approx(ratio / 1.25)
    assert seen.interval[0] < seen.speedup < seen.interval[1]
    assert (seen.arm, seen.rehearsed, seen.kept_share, seen.spoils) == (rounds, 8, 0.75, once.spoils)
    assert seen.parts == pytest.approx({"prefill": 0.1, "draft": 0.2, "judge": 0.3, "decode": 0.9})
    assert observed(once, rounds, target, []) == replace(once, arm=rounds)  # nothing was answered: as predicted


def test_the_luck_of_the_choice_is_what_the_best_loses_on_other_problems():
    """Against fresh problems: of many arms that differ by chance alone, the best looks better than it is by as much."""
    draw = np.random.default_rng(0)

    def arms(taken):
        return [Expected(arm=ArmChoice(inner=str(k)), speedup=float(predictor.target.sum() / own.sum()),
                         interval=(0.0, 0.0), seconds=tuple(own), spoils=(False,) * 30, parts={})
                for k, own in enumerate(taken)]  # fmt: skip

    trials = [replace(Engine().trial(i), tokens=10, wall_s=1.0) for i in range(30)]
    predictor = Predictor(trials, FirstFailure(), LIMIT)
    lost, said = [], []
    for _ in range(40):
        found = arms(draw.uniform(0.2, 0.8, size=(20, 30)))  # every arm is 2 times as fast, in truth
        lost.append(best_parse(found, DEMANDS).speedup / 2)
        said.append(luck_of_choice(found, predictor, DEMANDS, draws=60))
    assert np.mean(lost) > 1.08
    assert np.mean(said) - 1 == pytest.approx(np.mean(lost) - 1, rel=0.35)
    assert luck_of_choice(arms(np.full((1, 30), 0.5)), predictor, DEMANDS) == 1.0  # nothing to choose from


def test_what_the_chosen_arm_spoils_on_other_problems_is_bounded():
    """Of settings that all spoil more than is allowed the one that looks best seldom shows it; the bound does."""
    draw = np.random.default_rng(0)
    truth, n, settings = 0.08, 30, 28
    counted = draw.binomial(n, truth, size=(2000, settings)).min(1)
    assert np.mean(counted / n <= DEMANDS.spoilt) > 0.95  # fit, by what was counted
    assert np.mean([spoilt_at_most(int(k), n, settings) >= truth for k in counted]) >= 0.95
    assert spoilt_at_most(3, 30, 1) == pytest.approx(0.239, abs=5e-4)  # Clopper and Pearson, one side
    verdict, _ = advice(Engine())
    assert (verdict.settings, verdict.spoilt_at_most) == (1, spoilt_at_most(0, N, 1))


def test_a_good_pair_is_told_so():
    verdict, predictor = advice(Engine())
    assert verdict.helps
    assert verdict.recommended is verdict.parse
    assert not verdict.findings
    assert verdict.parse.speedup > 2
    assert headline(verdict).startswith("PARSE helps")
    assert predictor.ceiling() == pytest.approx(5, rel=0.1)


def test_a_draft_as_slow_as_the_target_does_not_help():
    verdict, _ = advice(Engine(draft=0.01, wrong=0.1))
    assert not verdict.helps
    assert "slow_draft" in kinds(verdict)
    assert verdict.recommended.arm.inner == "fast"
    assert "will not help" in headline(verdict)


def test_a_judge_that_refuses_all_does_not_help():
    verdict, _ = advice(Engine(scores=lambda right: 0.0, inner=(0.0, 1.0)))
    assert not verdict.helps
    assert "refusing_judge" in kinds(verdict)
    assert verdict.parse.kept_share == 0
    assert verdict.recommended.speedup == 1.0
    assert "run the target alone" in headline(verdict)


def test_a_random_judge_does_not_help():
    draw = random.Random(5)
    verdict, _ = advice(Engine(scores=lambda right: draw.random() ** 0.05, inner=(0.0, 1.0)))
    assert not verdict.helps
    assert "blind_judge" in kinds(verdict)
    assert verdict.parse.speedup > DEMANDS.gain  # it would be fast: that is not enough


def test_short_answers_do_not_pay_for_a_judge_pass():
    verdict, _ = advice(Engine(length=12, judge=0.08, draft=0.001, prefill=0.001, inner=(0.0, 1.0)))
    assert not verdict.helps
    assert kinds(verdict) == {"short_answers"}


def test_an_inner_level_alone_may_be_better():
    verdict, _ = advice(Engine(draft=0.004, inner=(0.0, 0.2)))
    assert not verdict.helps
    assert kinds(verdict) == {"inner_alone"}
    assert verdict.recommended.arm == ArmChoice(inner="fast")
    assert "inner=fast alone does" in headline(verdict)


def test_a_judge_that_lets_errors_through_spoils():
    verdict, _ = advice(Engine(scores=lambda right: 1.0, wrong=0.5, inner=(0.0, 1.0)))
    assert {"spoiling", "blind_judge"} <= kinds(verdict)
    assert not verdict.helps


def test_a_pair_that_answers_rightly_less_often_is_not_advised():
    """However fast it is. What is allowed, and what is not scored, changes nothing."""
    change = {"requests": 20, "interval": [-0.3, 0.05]}
    for fine in (None, change | {"change": 19 / 20 - 1}, change | {"change": 0.1}):
        assert advice(Engine(), accuracy=fine)[0] == advice(Engine())[0]
    verdict, _ = advice(Engine(), accuracy=change | {"change": -0.1})
    assert kinds(verdict) == {"less_accurate"}
    assert not verdict.helps
    assert verdict.recommended is verdict.alone
    assert "10 points less often [-30, +5], and 5 are allowed" in verdict.findings[0].text
    assert "will not help" in headline(verdict)


def test_too_few_wrong_drafts_say_nothing_of_the_judge():
    assert not blind({"auc": 0.5, "interval": [0.1, 0.9], "right": 30, "wrong": 2})
    assert not blind({"auc": None, "interval": None, "right": 30, "wrong": 0})
    assert blind({"auc": 0.5, "interval": [0.4, 0.6], "right": 30, "wrong": 20})


def test_final_answers_alone_count_whole_drafts_that_replace_a_right_answer():
    engine = Engine(scores=lambda right: 1.0)
    trials = [engine.trial(i) for i in range(N)]
    for trial in trials:
        judged = {"lines": Pass(**{**as_dict(trial.judged["lines"]), "right": None})}
        trials[trials.index(trial)] = Trial(**{**as_dict(trial), "judged": judged})
    predictor = Predictor(trials, FirstFailure(), LIMIT)
    assert not predictor.prefixes
    (found,) = predictor.parse("lines", [(0.5, 0.5)], ["none"])
    assert found.spoilt == pytest.approx(sum(not t.draft_correct for t in trials) / N)
    assert separations(predictor, ["lines"], 0)["lines"]["wrong"] == sum(not t.draft_correct for t in trials)


def test_of_arms_about_as_fast_the_safer_one_is_best():
    engine = Engine()
    predictor = Predictor([engine.trial(i) for i in range(N)], FirstFailure(), LIMIT)
    arms = predictor.parse("lines", [(0.1, 0.1), (0.5, 0.5), (0.9, 0.9)], ["none"])
    assert best_parse(arms, DEMANDS).arm.thresholds == (0.9, 0.9)
    assert best_parse(arms, Demands(gain=1.05, spoilt=1.0)).arm.thresholds == (0.1, 0.1)


def test_a_trial_survives_its_record():
    trial = Engine().trial(3)
    assert Trial.of_data(json.loads(json.dumps(trial.as_data()))) == trial


def as_dict(one):
    return {name: getattr(one, name) for name in one.__dataclass_fields__}


def test_no_accuracy_change_is_shown_where_nothing_was_scored():
    row = {"arm": "a", "predicted": 2.0, "predicted_interval": [1, 3], "measured": 2.0, "measured_interval": [1, 3],
           "error": 0.0, "tokens_speedup": 2.0, "accuracy_change": None, "kept_share": 0.5}  # fmt: skip
    shown = [check_rows({"checked": {"rows": [row | {"accuracy_change": x}]}})[0] for x in (None, -0.02)]
    at = CHECK_HEADS.index("accuracy change")
    assert [cells[at] for cells in shown] == ["-", "-2.0 points"]


def test_the_rehearsals_accuracy_is_of_what_was_scored_for_both():
    def requests(marks):
        result = {"tokens": [1, 2], "times": {"wall_s": 1.0}}
        return [{"id": str(i), "seed": 0, "correct": mark, "result": result} for i, mark in enumerate(marks)]

    target, arm = [True, True, True, None, False, True], [True, False, False, True, True, None]
    found = accuracy_change(requests(target), requests(arm))
    assert found["requests"] == 4
    assert found["change"] == pytest.approx(2 / 4 - 3 / 4)
    assert found["interval"][0] < found["change"] < found["interval"][1]
    assert accuracy_change(requests(target), requests([None] * 6)) is None
    failed = [one if i != 4 else one | {"correct": False, "result": None} for i, one in enumerate(requests(arm))]
    found = accuracy_change(requests(target), failed)
    assert (found["requests"], found["change"]) == (4, pytest.approx(1 / 4 - 3 / 4)), "not answered is not right"
    assert falls(found, Demands(gain=1.0, spoilt=0.4))
    record = {
        "rehearsed": {"accuracy": {"once": {"requests": 4, "change": -0.25, "interval": [-1, 0.5]}, "twice": None}}
    }
    assert rehearsed_accuracy(record) == {
        "once": "-25.0 points [-100.0, +50.0] on 4 of the problems", "twice": "not scored"}  # fmt: skip
    assert rehearsed_accuracy({"rehearsed": {"problems": 4}}) == {}
