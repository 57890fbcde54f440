"""Judges side by side: areas against scikit-learn, thresholds against trying all of them, and the whole command."""

import json
from dataclasses import replace

import numpy as np
import pytest

import commands
from parsedec.errors import ConfigError
from parsedec.experiment import judging
from parsedec.text.spelling import Draft
from parsedec.training.prefixes import Marked


def drafts(n, seed=0, cuts=(3, 5, 9), signal=1.0):
    """Made-up drafts of 9 tokens, and scores that know somewhat where they go wrong."""
    random = np.random.default_rng(seed)
    marked, scores = [], []
    for i in range(n):
        wrong = int(random.integers(0, 5))
        right = tuple(k < wrong for k in range(len(cuts)))
        draft = Draft(tuple(range(9)), "x" * 9, tuple(range(1, 10)), ended=True)
        marked.append(Marked(str(i), (1,), None, draft, cuts, right))
        scores.append(tuple(round(float(1 / (1 + np.exp(-signal * good - random.normal()))), 2) for good in right))
    return marked, scores


@pytest.mark.parametrize("seed", range(3))
def test_areas_are_those_of_scikit_learn(seed):
    metrics = pytest.importorskip("sklearn.metrics")
    marked, scores = drafts(40, seed)
    draws = np.random.default_rng(seed).multinomial(40, [1 / 40] * 40, 5)
    point, spread = judging._areas(marked, scores, draws)

    def expected(counts):
        chosen = np.repeat(np.arange(40), counts)
        right = [good for i in chosen for good in marked[i].right]
        return metrics.roc_auc_score(right, [value for i in chosen for value in scores[i]])

    assert point == pytest.approx(expected(np.ones(40, int)))
    assert spread == pytest.approx([expected(drawn) for drawn in draws])


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.83, 1.0])
def test_the_threshold_keeps_as_much_as_it_may(share):
    marked, scores = drafts(30)
    at = judging.threshold_keeping(marked, scores, share)
    every = sorted({value for row in scores for value in row} | {1.0})
    kept = {t: judging.share_kept(marked, scores, t) for t in every}
    best = max((k for k in kept.values() if k <= share), default=0.0)
    assert judging.share_kept(marked, scores, at) == pytest.approx(best)


def test_boundaries_are_counted_by_hand():
    marked, _ = drafts(3)
    marked = [Marked(m.problem, m.prompt, None, m.draft, m.cuts, r) for m, r in zip(marked, [
        (True, False, False), (True, True, True), (False, False, False)], strict=True)]  # fmt: skip
    found = judging.localised(marked, [(0.9, 0.1, 0.9), (0.9, 0.9, 0.2), (0.7, 0.9, 0.9)], 0.5)
    assert (found["wrong_drafts"], found["exact"], found["never_later"]) == (2, 1, 1)
    assert found["kept_share"] == pytest.approx((3 + 5 + 9) / 27)


def test_a_better_judge_is_seen_to_be_better_and_chance_is_not():
    """95 % intervals of the difference: a copy with other noise holds 0, a judge that knows more does not."""
    marked, scores = drafts(300, seed=1)
    twin, better = (
        drafts(300, seed=1)[1],
        [
            tuple(0.5 * value + 0.5 * good for value, good in zip(row, one.right, strict=True))
            for row, one in zip(scores, marked, strict=True)
        ],
    )
    said = {
        name: judging.Verdicts(scores=rows, rows=[9] * 300, seconds=[0.1] * 300, path="causal")
        for name, rows in (("first", scores), ("twin", twin), ("better", better))
    }
    summary = judging.summarise(said, [0.05], marked, kept_share=None, threshold=0.7)
    assert summary["judges"]["twin"]["auc_difference_interval"] == [0.0, 0.0]
    assert summary["judges"]["better"]["auc_difference_interval"][0] > 0
    low, high = summary["judges"]["first"]["auc_interval"]
    assert low < summary["judges"]["first"]["auc"] < high < low + 0.15
    assert summary["judges"]["first"]["decode_steps"] == pytest.approx(2.0)
    assert summary["kept_share"] == pytest.approx(judging.share_kept(marked, scores, 0.7))
    assert all(row["at"]["kept_share"] <= summary["kept_share"] + 1e-9 for row in summary["judges"].values())


def test_where_nothing_is_wrong_there_is_no_area():
    """And a table, and pictures of what there is."""
    marked = [replace(one, right=(True,) * 3) for one in drafts(5)[0]]
    verdicts = judging.Verdicts(scores=drafts(5)[1], rows=[9] * 5, seconds=[0.1] * 5, path="packed")
    summary = judging.summarise({"one": verdicts}, [0.1], marked, kept_share=None, threshold=0.7)
    found = summary["judges"]["one"]
    assert [found[key] for key in found if key.startswith("auc")] == [None] * 5
    assert judging.cells({"summary": summary})[0][:4] == ["one", "packed", "-", "-"]
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    from parsedec.reporting.judged import judge_pictures

    assert judge_pictures(summary, "judges") == []


def test_f1_is_processbenchs():
    marked, _ = drafts(2)
    marked = [Marked(m.problem, m.prompt, None, m.draft, m.cuts, right) for m, right in zip(marked, [
        (True, False, False), (True, True, True)], strict=True)]  # fmt: skip
    assert judging.localised(marked, [(0.9, 0.1, 0.9), (0.9, 0.9, 0.6)], 0.5)["f1"] == 1.0
    assert judging.localised(marked, [(0.9, 0.1, 0.9), (0.9, 0.9, 0.2)], 0.5)["f1"] == 0.0
    for one, scores in zip(marked, [(0.9, 0.1, 0.9), (0.9, 0.9, 0.6)], strict=True):  # one kind alone says nothing
        assert judging.localised([one], [scores], 0.5)["f1"] is None
    marked, scores = drafts(40, seed=3)
    found = judging.localised(marked, scores, 0.5)
    shares = (found["exact"] / found["wrong_drafts"], found["passed"])
    assert found["f1"] == pytest.approx(2 / sum(1 / share for share in shares))


def test_a_combination_is_scored_on_problems_it_was_not_fitted_on():
    """Two judges with independent noise together beat either; one that is fitted to nothing but noise tells nothing."""
    marked, first = drafts(400, seed=1)
    second = [tuple(float(1 / (1 + np.exp(-good - noise))) for good, noise in zip(one.right, row, strict=True))
              for one, row in zip(marked, np.random.default_rng(5).normal(size=(400, 3)), strict=True)]  # fmt: skip
    parts = [judging.Verdicts(scores=rows, rows=[9] * 400, seconds=[0.1] * 400) for rows in (first, second)]
    both = judging.cross_fitted(parts, marked)
    assert (both.rows[0], both.seconds[0], both.path) == (18, pytest.approx(0.2), "cross-fitted")
    ones = np.ones((1, 400))
    area = {name: judging._areas(marked, rows, ones)[0] for name, rows in
            (("first", first), ("second", second), ("both", both.scores))}  # fmt: skip
    assert area["both"] > max(area["first"], area["second"]) + 0.03
    noise = [tuple(row) for row in np.random.default_rng(7).uniform(size=(400, 3)).tolist()]
    blind = judging.cross_fitted([judging.Verdicts(scores=noise, rows=[9] * 400, seconds=[0.1] * 400)], marked)
    assert judging._areas(marked, blind.scores, ones)[0] == pytest.approx(0.5, abs=0.06)
    with pytest.raises(ConfigError, match="parts"):
        judging.cross_fitted([judging.Verdicts(scores=first[:3], rows=[9] * 3, seconds=[0.1] * 3)], marked[:3])


def test_the_command_measures_judges_on_labelled_steps(tmp_path):
    """The whole of experiments/judges.py on a file of two solutions, without a draft model."""
    steps = tmp_path / "steps.jsonl"
    rows = [{"problem": "How many?", "steps": ["1 + 1 = 2", "2 + 2 = 5", "5"], "label": label} for label in (1, -1)]
    steps.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = commands.run(
        "judges.py", "runtime=cpu", "draft=none", f"steps.path={steps}", "~judges.confidence", "~judges.escalating",
        f"output={tmp_path / 'out'}", cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(tmp_path / "out" / "record.json")
    record = json.loads((tmp_path / "out" / "record.json").read_text())
    judges = record["summary"]["judges"]
    assert list(judges) == ["label", "digit", "logprob"]
    assert [len(row) for row in record["scores"]["digit"]] == [3, 3]
    assert judges["logprob"]["rows"] == record["summary"]["draft_tokens"] < judges["label"]["rows"]
    assert judges["logprob"]["path"] == "causal"
    table = (tmp_path / "out" / "table.md").read_text()
    assert all(f"| {name} |" in table for name in judges)
    assert "2 drafts" in table


def test_the_area_of_whole_drafts_counts_the_last_cuts_of_those_that_ended():
    marked, scores = drafts(60, seed=2)
    cut_off = replace(marked[0].draft, ended=False)
    marked = [replace(one, draft=cut_off) if i % 3 == 0 else one for i, one in enumerate(marked)]
    verdicts = judging.Verdicts(scores=scores, rows=[9] * 60, seconds=[0.1] * 60)

    def summary(marked):
        return judging.summarise({"one": verdicts}, [0.1] * 60, marked, kept_share=0.5, threshold=0.5)

    found = summary(marked)
    area, low, high = found["judges"]["one"]["auc_whole"]
    last = [(row[-1], one.right[-1]) for row, one in zip(scores, marked, strict=True) if one.draft.ended]
    pairs = [(g > b) + 0.5 * (g == b) for g, right in last if right for b, wrong in last if not wrong]
    assert area == pytest.approx(sum(pairs) / len(pairs))
    assert low < area < high
    assert found["ended"] == 40
    unended = summary([replace(one, draft=cut_off) for one in marked])
    assert (unended["ended"], unended["judges"]["one"]["auc_whole"]) == (0, None)


@pytest.mark.slow
def test_the_command_measures_judges_by_final_answers(tmp_path):
    """On the zoo, whose checker says the same of whole drafts: final answers give that verdict to every prefix."""
    records = {}
    for labels in ("answers", "checker"):
        overrides = ["~judges.digit", "~judges.confidence", "~judges.escalating", f"output={tmp_path / labels}"]
        small = ["runtime=cpu", "runtime.backend=static", "task.n=20"]
        done = commands.run("judges.py", *small, f"labelled_by={labels}", *overrides, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        records[labels] = json.loads((tmp_path / labels / "record.json").read_text())
    answers, checked = (records[labels]["drafts"] for labels in ("answers", "checker"))
    assert [one["cuts"] for one in answers] == [one["cuts"] for one in checked]
    assert [one["right"] for one in answers] == [[one["right"][-1]] * len(one["cuts"]) for one in checked]
    assert {one["right"][-1] for one in answers} == {True, False}
    table = (tmp_path / "answers" / "table.md").read_text()
    assert "AUC of whole drafts" in table
    assert "first error exactly" not in table
    assert "first error exactly" in (tmp_path / "checker" / "table.md").read_text()
