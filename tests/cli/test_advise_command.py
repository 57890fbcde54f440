"""experiments/advise.py on the zoo pair: measured, advised, checked, resumed; what it writes runs what it advised."""

import html
import json
import runpy
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

pytest.importorskip("sklearn")

from configs import CONF, composed
from parsedec.advice import job
from parsedec.advice.job import run_advice
from parsedec.advice.measuring import Prober
from parsedec.advice.report import arm_rows, check_rows, command, configuration, markdown, write_reports
from parsedec.errors import ConfigError, OutputExistsError
from parsedec.experiment.build import build_engine
from parsedec.experiment.sweep import write_sweep
from parsedec.outer import PrefixVerification, TargetOnly
from parsedec.tasks.jsonl import TaskDataError
from parsedec.tasks.prompts import Prompts

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["runtime=cpu", "runtime.backend=static", "max_new_tokens=48", "n=3", "short=1", "segmenters=[lines]",
         "thresholds=[null,0.5]", "loops=[]", "inners=[draft_model]", "task.seed=3"]  # fmt: skip
QUICK = [*SMALL, "target.source=zoo:draft"]  # where what is advised does not matter


def advised(folder, *overrides, small=SMALL):
    overrides = [*small, *overrides, f"output={folder}"]
    record = run_advice(composed("advise", *overrides), folder, lambda own: composed("advise", *overrides, *own))
    with initialize_config_dir(str(CONF), version_base="1.3"):
        paths = write_reports(record, folder, overrides)
    return json.loads(json.dumps(record)), paths


def test_advice_on_the_zoo_is_checked_and_runs(tmp_path):
    folder = tmp_path / "out"
    record, (page, config) = advised(folder, "check.n=1", "loops=['rounds loop.rounds=2']", "gain=0.1")
    assert record["status"] == "finished"
    assert json.loads((folder / "record.json").read_text()) == record
    alone = record["verdict"]["alone"]["arm"]["inner"]  # the fastest one when it was measured, which may be none
    rehearsed = ["target", "once", "rounds loop.rounds=2", *(["inner alone"] if alone != "none" else [])]
    assert {name: len(runs) for name, runs in record["rehearsal"].items()} == dict.fromkeys(rehearsed, 3)
    right = {name: sum(run["correct"] for run in runs) / 3 for name, runs in record["rehearsal"].items()}
    assert {name: seen["change"] for name, seen in record["rehearsed"]["accuracy"].items()} == pytest.approx(
        {name: share - right["target"] for name, share in right.items() if name not in ("target", "inner alone")}
    )
    assert record["rehearsed"]["luck"] >= 1
    verdict, tried = record["verdict"], {str((a["arm"]["segmenter"], a["arm"]["thresholds"])) for a in record["arms"]}
    assert verdict["settings"] == len(tried - {str((None, None))})
    assert f" / {100 * verdict['spoilt_at_most']:.0f} %" in page.read_text()
    assert verdict["spoilt_at_most"] > 0.5  # three problems promise little
    assert [arm["rehearsed"] for arm in record["looped"]] == [3, 3]
    assert {trial["tokens"] > 20 for trial in record["trials"]} == {True}
    row = next(row for row in record["checked"]["rows"] if row["arm"] == record["verdict"]["parse"]["label"])
    seconds = {name: runs[0]["result"]["times"]["wall_s"] for name, runs in record["check"].items()}
    assert row["measured"] == pytest.approx(seconds["target"] / seconds["parse"])
    assert row["error"] == pytest.approx(row["predicted"] / row["measured"] - 1)
    assert check_rows(record)[0][0] in page.read_text() == markdown(record, command(folder))
    direct = composed("config", "runtime=cpu", *record["verdict"]["overrides"])
    pytest.importorskip("matplotlib", reason="a report needs matplotlib")
    report = runpy.run_path(str(ROOT / "experiments" / "report.py"))["main"]
    assert report([str(folder)]) == 0
    text = html.unescape((folder / "report.html").read_text())
    assert record["verdict"]["text"] in text
    assert all(cell in text for row in (*check_rows(record), *arm_rows(record)) for cell in row)
    assert not (folder / "table.md").exists()
    assert write_sweep(folder.parent) is None  # its arms answered nothing that a sweep's table could show
    engine = build_engine(direct)
    written = loaded(config)
    same = build_engine(written)
    for one in (engine, same):
        assert isinstance(one.outer, PrefixVerification if record["verdict"]["helps"] else TargetOnly)
    assert same.outer == engine.outer
    assert (written.task.seed, written.max_new_tokens) == (3, 48)


def loaded(config):
    """The configuration of `run.py --config-dir … experiment=advised`."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", overrides=[f"hydra.searchpath=[{config.parents[1]}]", f"experiment={config.stem}"])


def test_a_broken_run_goes_on_where_it_was(tmp_path, monkeypatch):
    measure, calls = Prober.measure, []

    def twice(self, problem, index, *, inners):
        calls.append(problem.id)
        if len(calls) == 4:  # the first one is measured twice
            raise KeyboardInterrupt
        return measure(self, problem, index, inners=inners)

    folder = tmp_path / "out"
    monkeypatch.setattr(Prober, "measure", twice)
    with pytest.raises(KeyboardInterrupt):
        advised(folder, small=QUICK)
    first = json.loads((folder / "record.json").read_text())
    assert (first["status"], len(first["trials"])) == ("interrupted", 2)
    with pytest.raises(OutputExistsError):
        advised(folder, small=QUICK)
    monkeypatch.setattr(Prober, "measure", measure)
    record, _ = advised(folder, "resume=true", small=QUICK)
    assert record["status"] == "finished"
    assert record["trials"][:2] == first["trials"]
    assert len(record["trials"]) == 3


def test_what_was_another_arm_is_run_again_and_what_is_finished_is_left_alone(tmp_path, monkeypatch):
    folder, wanted = tmp_path / "out", ("inners=[]", "n=2")
    record, _ = advised(folder, *wanted, small=QUICK)
    assert set(record["arm_overrides"]["rehearsal"]) == set(record["rehearsal"]) == {"target", "once"}
    for requests in record["rehearsal"].values():
        for request in requests:
            request["of"] = "the first run"
    record["arm_overrides"]["rehearsal"]["once"][-1] = "loop=something_else"
    record["rehearsal"]["no_longer_wanted"] = record["rehearsal"]["once"]
    (folder / "record.json").write_text(json.dumps(record | {"status": "interrupted"}))
    again, _ = advised(folder, *wanted, "resume=true", small=QUICK)
    assert {name: ["of" in one for one in runs] for name, runs in again["rehearsal"].items()} == {
        "target": [True, True], "once": [False, False]}  # fmt: skip
    assert "loop=something_else" not in again["arm_overrides"]["rehearsal"]["once"]

    def loaded(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Prober, "__init__", loaded)
    assert advised(folder, *wanted, "resume=true", small=QUICK)[0] == again
    again["trials"][0]["error"] = "too long"  # is tried again
    (folder / "record.json").write_text(json.dumps(again))
    with pytest.raises(KeyboardInterrupt):
        advised(folder, *wanted, "resume=true", small=QUICK)


def test_the_target_as_its_own_draft_model_does_not_help(tmp_path):
    wanted = "gain=2"  # two models as fast as each other are measured here: by no chance is one twice as fast
    record, _ = advised(tmp_path / "out", "draft.model.source=zoo:target", "inners=[]", "n=2", wanted)
    verdict = record["verdict"]
    assert not verdict["helps"]
    assert "slow_draft" in {finding["kind"] for finding in verdict["findings"]}
    assert verdict["overrides"] == ["outer=none", "inner=none"]


def test_a_judge_that_refuses_all_does_not_help(tmp_path):
    refusing = ["judge=scripted", "judge.kept=0", "judge.whole=0", "judge.spread=0"]
    record, _ = advised(tmp_path / "out", *refusing, "inners=[]", "n=2")
    verdict = record["verdict"]
    assert not verdict["helps"]
    assert verdict["parse"]["kept_share"] == 0
    assert "refusing_judge" in {finding["kind"] for finding in verdict["findings"]}


@pytest.mark.slow
def test_of_the_rehearsed_loops_one_that_stays_right_is_advised(tmp_path, monkeypatch):
    """And none where all of them fall: 'use it' is not said of a pair that loses what it is asked for."""
    wanted = ["draft.model.source=zoo:draft", "inners=[]", "n=2", "gain=0.01", "loops=['rounds loop.rounds=2']"]
    fell, kept = ({"requests": 9, "change": change, "interval": [-1.0, 1.0]} for change in (-0.5, 0.0))

    path = tmp_path / "out" / "record.json"

    def advising(changes):
        """On the same measurements: what a broken run has of them is not made again."""
        real = iter(changes)
        monkeypatch.setattr(job, "accuracy_change", lambda *_: next(real))
        if path.exists():
            path.write_text(json.dumps(json.loads(path.read_text()) | {"status": "interrupted"}))
        return advised(path.parent, *wanted, "resume=true")[0]["verdict"]

    for changes, loop in (((fell, kept), "rounds loop.rounds=2"), ((kept, fell), "once")):
        verdict = advising(changes)
        assert verdict["helps"]
        assert verdict["recommended"]["arm"]["loop"] == loop
    verdict = advising((fell, fell))
    assert not verdict["helps"]
    assert verdict["overrides"] == ["outer=none", "inner=none"]
    assert "less_accurate" in {finding["kind"] for finding in verdict["findings"]}
    assert advising((None, None))["helps"]


def test_inner_levels_that_do_not_fit_are_left_out_with_the_reason(tmp_path, tmp_path_factory):
    prompts = tmp_path / "mine.jsonl"
    asked = "Tom has 12 coins. Ana gives Tom 30 coins. How many coins does Tom have now?"
    prompts.write_text("\n".join(json.dumps({"prompt": asked, **more}) for more in ({}, {"reference": 42})))
    overrides = [o for o in SMALL if not o.startswith(("task", "n=", "inners"))]
    overrides += ["task=prompts", f"task.path={prompts}", "n=2", "target.source=zoo:draft", "inners=[medusa,ngram]"]
    cfg = composed("advise", *overrides, "output=unused")
    record = run_advice(cfg, tmp_path / "out", lambda own: composed("advise", *overrides, *own))
    assert set(record["costs"]["left_out_inners"]) == {"medusa"}
    assert [trial["agreement"] for trial in record["trials"]] == [True, False]
    assert record["trials"][0]["own_correct"]
    assert record["trials"][0]["draft_correct"]  # the same model writes both


def test_a_preset_of_the_users_is_part_of_what_is_advised(tmp_path):
    """Its task has settings that the default one has not, and its segmenter is not the advised one."""
    task = tmp_path / "humaneval.jsonl"
    task.write_text("")
    own = ["experiment=qwen_coder_humaneval", "target=any", "target.source=zoo:target", f"task.path={task}", "n=12"]
    verdict = {"text": "Yes.", "overrides": ["segmenter=lines", "boundary.threshold=0.9", "inner=ngram"]}
    written = tmp_path / "experiment" / "advised.yaml"
    with initialize_config_dir(str(CONF), version_base="1.3"):
        text = configuration({"verdict": verdict, "costs": {"problems": 3}}, own)
    written.parent.mkdir()
    written.write_text(text)
    cfg = loaded(written)
    assert (cfg.task.name, cfg.task.path, cfg.target.source) == ("humaneval", str(task), "zoo:target")
    assert cfg.target.dtype == "bfloat16"  # the preset's
    assert (cfg.boundary.threshold, cfg.boundary.full_threshold) == (0.9, 0.66)
    assert (cfg.segmenter._target_, cfg.inner._target_) == (
        "parsedec.segmenters.Lines",
        "parsedec_adapters.ngram.Ngram",
    )


def test_prompts_of_ones_own(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"prompt": "How many?", "reference": 3}\n\n{"prompt": "Why?"}\n')
    task = Prompts(path=path)
    known, unknown = task.problems()
    assert task.score(known, "It is 1 or 3.").correct
    assert not task.score(known, "It is 4.").correct
    assert task.score(unknown, "Because.").correct is None
    path.write_text('{"question": "How many?"}\n')
    with pytest.raises(TaskDataError, match='no "prompt"'):
        Prompts(path=path).problems()


@pytest.mark.parametrize(
    ("wrong", "match"),
    [("n=300", "more than the 200 problems"), ("short=5", "short=5"), ("outer=none", "outer is TargetOnly"),
     ("draft=none", "draft is none")],
)  # fmt: skip
def test_what_cannot_be_advised_on_is_refused(tmp_path, wrong, match):
    with pytest.raises(ConfigError, match=match):
        advised(tmp_path / "out", wrong)
