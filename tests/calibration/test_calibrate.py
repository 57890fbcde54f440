"""Calibration from end to end on the zoo pair: its decisions are the engine's, a broken run ends as an unbroken one."""

import copy
import json
import re
from dataclasses import replace

import pytest
import yaml

pytest.importorskip("scipy")
pytest.importorskip("sklearn")

from hydra.utils import instantiate

import configs
from oracle.test_judge_kinds import probe_folder
from parsedec import load
from parsedec.calibration import job
from parsedec.calibration.fitting import require_possible
from parsedec.calibration.job import run_calibration
from parsedec.calibration.report import FILE, settings, write_reports
from parsedec.calibration.scoring import Scorer
from parsedec.calibration.sources import Steps, prompt_digests
from parsedec.errors import ConfigError, OutputExistsError
from parsedec.experiment import calibrated
from parsedec.experiment.build import build_engine
from parsedec.experiment.cli import expand_shorthand
from parsedec.tasks.jsonl import TaskDataError
from parsedec.tasks.zoo_arithmetic import ZooArithmetic

SMALL = [
    "runtime=cpu",
    "runtime.backend=static",
    "max_new_tokens=160",
    "goal.risk=0.5",
    "goal.confidence=0.6",
    "goal.explore=0.5",
]
CHECKED = ["labels.fit.n=12", "labels.check.n=4", "goal.points=6"]
ANSWERS = ["labels=answers", "task.split=calibration", "labels.fit.n=5", "labels.check={n: 4, split: test}",
           "goal.points=2", "goal.of=requests"]  # fmt: skip


def composed(folder, *overrides, config="calibrate"):
    return configs.composed(config, *overrides, f"output={folder}")


def fitted(folder, *overrides):
    return run_calibration(composed(folder, *SMALL, *overrides), folder)


def figures_of(record):
    """What a run without a break must give, too."""
    kept = copy.deepcopy(json.loads(json.dumps(record)))
    for key in ("resume", "output"):
        del kept["config"][key]
    return {key: value for key, value in kept.items() if key not in ("provenance", "resumed_from")}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken") / "out"
    record = fitted(folder, *CHECKED)
    write_reports(record, folder, "first_failure")
    return folder, record


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    return fitted(tmp_path_factory.mktemp("outcome") / "out", *ANSWERS)


def engine_at(used, *overrides):
    thresholds = [f"boundary.{name}={used[name]!r}" for name in ("threshold", "full_threshold")]
    return build_engine(
        composed("unused", "runtime=cpu", "runtime.backend=static", *thresholds, *overrides, config="config")
    )


def test_scores_and_decisions_are_the_engines(unbroken):
    _, record = unbroken
    used, held = record["calibration"]["used"], record["calibration"]["check"]
    engine, task = engine_at(used), ZooArithmetic(n=4, split="test")
    rounds = [engine.generate(p.prompt, max_new_tokens=160).rounds[0] for p in task.problems()]
    samples = [sample for sample in record["samples"] if sample["part"] == "check"]
    for one, sample in zip(rounds, samples, strict=True):
        assert [s.tokens for s in one.segments] == [b - a for a, b in zip([0, *sample["cuts"]], sample["cuts"])]  # noqa: B905
        assert [s.score for s in one.segments] == pytest.approx(sample["scores"], abs=1e-5)
    assert held["accepted_whole"] == sum(one.accepted_whole for one in rounds)
    kept = sum(one.kept_tokens - one.accepted_whole for one in rounds)  # the end token apart
    assert held["kept_share"] == pytest.approx(kept / sum(one.judged_tokens for one in rounds))


@pytest.mark.parametrize("judge", ["confidence", "probe", "combined"])
def test_judges_that_read_more_than_logits_are_calibrated_as_the_engine_runs_them(judge, tmp_path):
    """One reads what the draft model recorded, the others a hidden state of the target."""
    probe_folder(tmp_path, load("zoo:target", dtype="float32", device="cpu"))
    chosen = ["judge=confidence"] if judge == "confidence" else [f"judge={judge}", f"judge.weights={tmp_path}"]
    record = fitted(tmp_path / "out", *CHECKED[1:], "labels.fit.n=3", *chosen)
    engine, task = engine_at(record["calibration"]["used"], *chosen), ZooArithmetic(n=4, split="test")
    samples = [sample for sample in record["samples"] if sample["part"] == "check"]
    scores = [score for sample in samples for score in sample["scores"]]
    assert len(set(scores)) > 3
    for problem, sample in zip(task.problems(), samples, strict=True):
        (one,) = engine.generate(problem.prompt, max_new_tokens=160).rounds
        assert [s.score for s in one.segments] == pytest.approx(sample["scores"], abs=1e-5)


@pytest.mark.parametrize(
    "chosen",
    [["judge=probe"], ["judge=combined"], ["judge=confidence", "judge@judge.judge=probe"]],
    ids=["probe", "combined", "confidence"],
)
def test_a_probe_is_not_calibrated_on_what_it_was_trained_on(chosen, tmp_path, tiny_target, monkeypatch, caplog):
    name = "judge.judge.weights" if "confidence" in chosen[0] else "judge.weights"
    settings = [*chosen, f"{name}={tmp_path}", "labels=answers", "task.split=test", "labels.fit={n: 30}"]
    known = prompt_digests(ZooArithmetic(n=3, split="test").problems())
    monkeypatch.setattr(job, "Scorer", lambda *_: pytest.fail("models would be loaded"))
    probe_folder(tmp_path, tiny_target, problems=known)
    with pytest.raises(ConfigError, match=r"3 of 30 problems, e\.g\. .* were trained or chosen on"):
        fitted(tmp_path / "out", *settings)
    others = prompt_digests(ZooArithmetic(n=3, split="train").problems())
    for problems, said in ((others, ""), (None, "does not say which problems")):
        probe_folder(tmp_path, tiny_target, **({} if problems is None else {"problems": problems}))
        caplog.clear()
        with pytest.raises(pytest.fail.Exception, match="would be loaded"):  # it goes on
            fitted(tmp_path / "out", *settings)
        assert said in caplog.text if said else not caplog.records


def test_labelled_steps_have_no_draft_model_to_be_confident(steps, tmp_path):
    with pytest.raises(ConfigError, match="written by no draft model"):
        fitted(tmp_path / "out", "labels=steps", f"labels.path={steps}", "judge=confidence")


def test_labels_are_the_checkers(unbroken):
    task = ZooArithmetic(n=4, split="test")
    samples = {sample["id"]: sample for sample in unbroken[1]["samples"]}
    for problem in task.problems():
        sample = samples[problem.id]
        score = task.score(problem, sample["text"])
        assert sample["correct"] == score.correct
        assert sum(sample["right"]) == (len(sample["cuts"]) if score.correct else score.first_wrong_line)


@pytest.mark.parametrize("settings", [CHECKED, ANSWERS], ids=["checker", "answers"])
def test_a_broken_run_ends_as_an_unbroken_one(settings, unbroken, outcome, tmp_path, monkeypatch):
    whole = unbroken[1] if settings is CHECKED else outcome
    verb = "sample" if settings is CHECKED else "answer"
    real, calls = getattr(Scorer, verb), []

    def breaking(self, *arguments):
        calls.append(arguments)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(self, *arguments)

    monkeypatch.setattr(Scorer, verb, breaking)
    with pytest.raises(KeyboardInterrupt):
        fitted(tmp_path / "out", *settings)
    stored = json.loads((tmp_path / "out" / "record.json").read_text())
    assert stored["status"] == "interrupted"
    assert len(stored["samples"]) == (3 if settings is CHECKED else 9)
    with pytest.raises(OutputExistsError, match="resume=true"):
        fitted(tmp_path / "out", *settings)
    again = fitted(tmp_path / "out", *settings, "resume=true")
    assert figures_of(again) == figures_of(whole)
    assert len({id(a[0]) for a in calls}) == len(calls) or settings is ANSWERS  # nothing was judged twice
    monkeypatch.delattr(Scorer, "__init__")  # a finished one is left alone: nothing is loaded
    assert figures_of(fitted(tmp_path / "out", *settings, "resume=true")) == figures_of(again)


OTHERS = {
    "segmenter=sentences": "segmenter is Sentences, not Lines",
    "loop=rounds loop.rounds=3": "loop is Rounds, not Once",
    "gate=adaptive": "gate is Adaptive, not Always",
    "outer=parse_streamed": "outer is StreamedVerification, not PrefixVerification",
    "outer.max_draft_tokens=20": "outer.max_draft_tokens is 20, not None",
    "sampling.temperature=1.0": "sampling.temperature is 1.0, not 0.0",
    "max_new_tokens=40": "max_new_tokens is 40, not 160",
    "stop=[b]": "stop is ['b'], not []",
    "task=zoo_lists": "task is ZooLists, not ZooArithmetic",
    "task.max_number=20": "task.max_number is 20, not 99",
    "draft.model.template_args={enable_thinking:true}": "prompts.draft.template_args is {'enable_thinking': True}",
    "task.n=3 task.seed=4 task.split=train seed=5 batch=4 inner=ngram": "",  # which problems, and lossless inner levels
}


def test_the_yaml_applies_the_thresholds(unbroken, tmp_path, caplog):
    folder, record = unbroken
    assert record["calibration"]["used"]["fitted"]
    assert {"table.md", FILE, "record.json"} <= {path.name for path in folder.iterdir()}
    overrides = expand_shorthand(f"calibration={folder / FILE}", configs.CONF)
    overrides.append("max_new_tokens=160")
    cfg = composed("unused", "runtime=cpu", "runtime.backend=static", *overrides, config="config")
    assert cfg.calibration == str(folder / FILE)
    bound = build_engine(cfg).outer.boundary
    used = record["calibration"]["used"]
    assert (bound.threshold, bound.full_threshold) == (used["threshold"], used["full_threshold"])
    assert not caplog.records
    for changed, said in OTHERS.items():
        caplog.clear()
        calibrated.warn_of_other_calibration(composed("unused", *overrides, *changed.split(), config="config"))
        assert (said in caplog.text and "does not hold for this run" in caplog.text) if said else not caplog.records
    caplog.clear()
    calibrated.warn_of_other_calibration(composed("unused", *overrides, "task=zoo_lists", config="serve"))
    assert not caplog.records  # what clients ask is not known
    (tmp_path / "other.yaml").write_text("overrides: [judge=label]\n")
    with pytest.raises(ConfigError, match="holds no overrides of the group boundary"):
        expand_shorthand(f"calibration={tmp_path / 'other.yaml'}", configs.CONF)
    with pytest.raises(ConfigError, match="cannot be read"):
        expand_shorthand(f"calibration={tmp_path / 'none.yaml'}", configs.CONF)


def test_the_report_says_the_goal_and_whether_it_holds(unbroken):
    text = (unbroken[0] / "table.md").read_text()
    for words in ("at most 50 % of those of which something was kept, with 60% confidence", "AUC, prefixes", "goal **"):
        assert words in text


def test_outcomes_are_the_engines(outcome):
    """Accuracy with and without what is kept, against whole requests through the engine."""
    task = ZooArithmetic(n=4, split="test")
    found = outcome["calibration"]["outcome"]
    for name, overrides in (("accuracy", []), ("target_accuracy", ["outer=none"])):
        engine = engine_at(outcome["calibration"]["used"], *overrides)
        answers = [(p, engine.generate(p.prompt, max_new_tokens=160).text) for p in task.problems()]
        assert found[name]["count"] == sum(task.score(p, text).correct for p, text in answers)
    assert "PARSE does not" in outcome["controls"]
    assert all(sample["right"] is None for sample in outcome["samples"])
    assert "prefixes" not in outcome["calibration"]


@pytest.fixture
def steps(tmp_path):
    rows = [
        {"id": str(i), "prompt": f"Tom has {i} apples.", "reference": wrong,
         "meta": {"steps": ["Tom has 3 apples.", "So he has 4 apples.", "The answer is 4."]}}
        for i, wrong in enumerate([-1, 0, 1, 2, -1, 1, 1, -1] * 2)
    ]  # fmt: skip
    path = tmp_path / "steps.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_labelled_steps(steps, tmp_path):
    record = fitted(tmp_path / "out", "labels=steps", f"labels.path={steps}", "draft=none", "goal.points=4")
    wanted = {"-1": [True] * 3, "0": [False] * 3, "1": [True, False, False], "2": [True, True, False]}
    rows = {row["id"]: row for row in map(json.loads, steps.read_text().splitlines())}
    assert len(record["samples"]) == 16
    for sample in record["samples"]:
        row = rows[sample["id"]]
        assert (
            sample["right"] == tuple(wanted[str(row["reference"])]) or sample["right"] == wanted[str(row["reference"])]
        )
        assert sample["text"] == "\n\n".join(row["meta"]["steps"])
        assert sample["correct"] == (row["reference"] == -1)
    assert {sample["part"] for sample in record["samples"]} == {"fit", "check"}
    holds = yaml.safe_load(settings(record, "first_failure"))["holds_for"]
    assert holds["drafts"] == f"solutions of {steps}"
    assert "sampling" not in holds


def test_problems_with_several_solutions_are_counted_as_problems(steps, tmp_path):
    rows = [json.loads(line) for line in steps.read_text().splitlines()]
    steps.write_text("\n".join(json.dumps(row | {"id": f"{row['id']}/{k}"}) for row in rows for k in range(3)))
    record = fitted(tmp_path / "out", "labels=steps", f"labels.path={steps}", "draft=none", "goal.points=4")
    counts, held = record["calibration"]["counts"], record["calibration"]["check"]
    assert counts["fit"] + counts["check"] == 48
    assert counts["fit_problems"] + counts["check_problems"] == 16
    assert counts["explored"] + counts["tested"] == counts["fit_problems"]
    assert held["drafts"] == counts["check_problems"]
    write_reports(record, tmp_path / "out", "first_failure")
    assert (
        f"{counts['check']} samples of {counts['check_problems']} problems" in (tmp_path / "out/table.md").read_text()
    )


def test_solutions_of_one_problem_stay_in_one_part(tmp_path):
    """In the form of ProcessBench, which has several; and none is in both the fit and the check."""
    rows = [{"problem": f"problem {i % 7}", "steps": ["a", "b"], "label": i % 3 - 1} for i in range(35)]
    path, other = tmp_path / "steps.jsonl", tmp_path / "other.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    questions = Steps(path=path).questions(seed=1)
    texts = {part: {q.problem.prompt for q in questions if q.part == part} for part in ("fit", "check")}
    assert len(questions) == 35
    assert all(texts.values())
    assert not texts["fit"] & texts["check"]
    other.write_text(json.dumps(rows[3]))
    with pytest.raises(ConfigError, match="in both"):
        Steps(path=path, check_path=other).questions(seed=1)


@pytest.mark.parametrize("labels", ["checker", "checker_training", "answers"])
def test_problems_are_chosen_by_any_setting_of_their_task(labels):
    asked = ["labels.fit={split: train, n: 20, seed: 3}", "labels.check.seed=5", "labels.check.n=6"]
    overrides = [one for argument in asked for one in expand_shorthand(argument, configs.CONF)]
    source = instantiate(composed("unused", f"labels={labels}", *overrides).labels)
    assert source.fit == {"split": "train", "n": 20, "seed": 3}
    assert (source.check["seed"], source.check["n"]) == (5, 6)
    (typo,) = expand_shorthand("labels.fit.sead=3", configs.CONF)
    with pytest.raises(ConfigError, match=r"does not fit ZooArithmetic: .*'sead'.*seed"):
        instantiate(composed("unused", f"labels={labels}", typo).labels).questions(0)


@pytest.mark.parametrize(
    ("overrides", "error", "said"),
    [
        (["outer=none"], ConfigError, "no thresholds to calibrate"),
        (["labels=answers", "labels.fit.n=2", "labels.check={n: 2}", "task.split=test"], ConfigError, "in both"),
        (["labels=answers", "labels.fit.n=9", "sampling.temperature=1"], ConfigError, "greedy"),
        (["labels=answers", "labels.check={path: a}"], ConfigError, "does not fit ZooArithmetic"),
        (["labels=steps", "labels.path=nowhere"], TaskDataError, "nowhere"),
        (["labels=answers", "goal.method=crc", "goal.of=requests"], ConfigError, "goal.method=crc needs errors"),
        (["labels=answers", "goal.risk=0.01", "goal.confidence=0.95"], ConfigError, r"takes 299 .* Label about \d+"),
        (["goal.risk=0.01", "goal.confidence=0.95", "labels.fit.n=300"], ConfigError, "takes 299 even if no error"),
    ],
)
def test_what_cannot_be_calibrated_is_refused(overrides, error, said, tmp_path, monkeypatch):
    monkeypatch.setattr(Scorer, "sample", None)  # before anything is judged
    with pytest.raises(error, match=said):
        fitted(tmp_path / "out", *overrides)
    assert not (tmp_path / "out" / "record.json").exists()


@pytest.mark.parametrize(
    "overrides",
    [[], ["labels=answers", "task=zoo_arithmetic", "goal.of=requests", "goal.risk=0.05"]],
    ids=["default", "answers"],
)
def test_what_the_file_documents_can_succeed(overrides, tmp_path):
    """The defaults test enough problems for the goal, and so do as many as a refusal asks for."""
    cfg = composed(tmp_path, *overrides)
    goal, source = instantiate(cfg.goal), instantiate(cfg.labels)
    require_possible(goal, source.questions(cfg.seed), cfg.seed, prefixes=source.prefixes)
    strict = replace(goal, risk=goal.risk / 5)
    with pytest.raises(ConfigError, match="Label about") as told:
        require_possible(strict, source.questions(cfg.seed), cfg.seed, prefixes=source.prefixes)
    fit, total = map(int, re.search(r"about (\d+) problems to fit \((\d+)", str(told.value)).groups())
    source = replace(source, fit=dict(source.fit) | {"n": total if source.check is None else fit})
    require_possible(strict, source.questions(cfg.seed), cfg.seed, prefixes=source.prefixes)


def test_a_bad_label_is_named(steps, tmp_path):
    steps.write_text(steps.read_text().replace('"reference": 2', '"reference": 3'))
    with pytest.raises(TaskDataError, match="label=3 for 3 steps"):
        fitted(tmp_path / "out", "labels=steps", f"labels.path={steps}", "draft=none")
