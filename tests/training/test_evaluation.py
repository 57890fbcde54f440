"""Evaluation: its figures by hand on scripted scores, and its decisions equal to the engine's on the zoo pair."""

import pytest

import tiny
from parsedec.boundary import FirstFailure
from parsedec.engine import Parse
from parsedec.models.language_model import load
from parsedec.outer import PrefixVerification
from parsedec.tasks.zoo_arithmetic import ZooArithmetic
from parsedec.training.evaluation import Judged, calibrate, evaluate, localisation, separation
from parsedec.training.packing import Answer


def judged(right, scores):
    n = len(right)
    taught = n + 1 if all(right) else 0
    return Judged(
        Answer(tuple(range(n)), tuple(range(1, n + 1)), tuple(right), taught), True, all(right), tuple(scores)
    )


def test_auc_counts_pairs():
    assert separation([judged([True, False], [0.9, 0.1])]) == 1.0
    assert separation([judged([True, False], [0.1, 0.9])]) == 0.0
    assert separation([judged([True, False], [0.5, 0.5])]) == 0.5
    assert separation([judged([True, True, False], [0.9, 0.2, 0.5])]) == 0.5
    assert separation([judged([True], [0.5])]) is None


def test_localisation_compares_first_failures():
    drafts = [
        judged([True, False, False], [0.9, 0.2, 0.1]),  # exact
        judged([True, False, False], [0.3, 0.2, 0.1]),  # too early
        judged([True, False, False], [0.9, 0.8, 0.1]),  # too late
        judged([True, True], [0.1, 0.1]),  # not wrong: does not count
    ]
    assert localisation(drafts, 0.5) == {"threshold": 0.5, "wrong_drafts": 3, "exact": 1, "never_later": 2}


def test_calibration_takes_the_lowest_threshold_that_costs_little():
    def report(*shares):
        rows = [{"threshold": t, "accuracy": {"share": s}} for t, s in zip((0.5, 0.9, 0.99), shares, strict=True)]
        return {"target_accuracy": {"share": 0.98}, "thresholds": rows}

    model = tiny.model("llama")
    assert calibrate(model, report(0.90, 0.975, 0.98), 0.01).threshold == 0.9
    assert calibrate(model, report(0.90, 0.91, 0.92), 0.01).threshold == 0.99
    assert calibrate(model, report(0.98, 0.91, 0.92), 0.01).full_threshold == 0.5


@pytest.fixture(scope="module")
def pair():
    return [load(f"zoo:{name}", dtype="float32", device="cpu", backend="static") for name in ("target", "draft")]


def test_evaluation_decides_as_the_engine_does(pair):
    task = ZooArithmetic(n=8, split="calibration", seed=0)
    report = evaluate(*pair, task, batch=4, thresholds=(0.5, 0.9))
    for entry in report["thresholds"]:
        rule = FirstFailure(threshold=entry["threshold"], full_threshold=entry["threshold"])
        engine = Parse(*pair, outer=PrefixVerification(boundary=rule))
        results = [
            engine.generate([{"role": "user", "content": p.prompt}], max_new_tokens=160) for p in task.problems()
        ]
        rounds = [r.rounds[0] for r in results]
        right = [task.score(p, r.text).correct for p, r in zip(task.problems(), results, strict=True)]
        assert entry["accuracy"]["right"] == sum(right)
        assert entry["accepted_whole"] == sum(r.accepted_whole for r in rounds)
        assert entry["kept_tokens"] == sum(r.kept_tokens - r.accepted_whole for r in rounds)  # the end token apart
        assert entry["drafted_tokens"] == sum(r.judged_tokens for r in rounds)
    assert report["target_accuracy"]["right"] >= report["draft_accuracy"]["right"]
