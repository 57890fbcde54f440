"""A run that is resumed after its task's data changed: its answers are neither lost nor mixed, and it says so."""

import json
import re

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from parsedec import Parse, load
from parsedec.advice.job import run_advice
from parsedec.calibration.job import run_calibration
from parsedec.calibration.sources import asked_of
from parsedec.errors import OutputExistsError
from parsedec.experiment.build import plain
from parsedec.experiment.job import run_job
from parsedec.experiment.nodes import conf_folder
from parsedec.experiment.problems import digests
from parsedec.experiment.record import SCHEMA_VERSION
from parsedec.experiment.runner import Arm
from parsedec.outer import TargetOnly
from parsedec.training.probe_job import train_probes

ROWS = [{"id": name, "prompt": f"Tom has {n} coins. How many?", "reference": n, "meta": {}} for name, n in
        (("a", 3), ("b", 4), ("c", 5))]  # fmt: skip


def composed(config, *overrides):
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        return compose(config, overrides=list(overrides))


@pytest.fixture(scope="module")
def engine():
    return Parse(load("zoo:draft", dtype="float32", device="cpu", backend="static"), outer=TargetOnly())


@pytest.fixture
def run(tmp_path, engine):
    """Runs what is to stand in the task's file, None: there is none; `loads`: how often models were wanted."""
    path = tmp_path / "task.jsonl"

    def run(rows, *overrides):
        path.unlink(missing_ok=True) if rows is None else path.write_text("\n".join(map(json.dumps, rows)))
        own = ["outer=none", "warmup=0", "max_new_tokens=4", "task=gsm8k", "task.n=null", f"task.path={path}"]
        cfg = composed("config", *own, *overrides)

        def arms():
            run.loads += 1
            return [Arm("run", engine)]

        return run_job(cfg, tmp_path / "out", arms)

    run.loads = 0
    return run


def broken_off(folder, keep, **changed):
    """The record as an interruption leaves it, after `keep` requests."""
    record = json.loads((folder / "record.json").read_text()) | {"status": "interrupted"} | changed
    del record["arms"][0]["requests"][keep:]
    (folder / "record.json").write_text(json.dumps(record))


CHANGES = {"prompt": "Tom has 9 coins. How many?", "reference": 9, "meta": {"solution": "#### 9"}}


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("key", CHANGES)
def test_answers_to_problems_that_are_others_now_are_refused(key, finished, run, tmp_path):
    run(ROWS)
    if not finished:
        broken_off(tmp_path / "out", 2)
    stored = (tmp_path / "out" / "record.json").read_bytes()
    with pytest.raises(OutputExistsError, match=r"answers to 1 problems that are others now, such as 'b'.*output=DIR"):
        run([ROWS[0], ROWS[1] | {key: CHANGES[key]}, ROWS[2]], "resume=true")
    assert run.loads == 1
    assert (tmp_path / "out" / "record.json").read_bytes() == stored


def test_problems_without_an_answer_may_be_repaired_and_added(run, tmp_path):
    begun = run(ROWS)["arms"][0]["requests"]
    broken_off(tmp_path / "out", 2)
    rows = [*ROWS[:2], ROWS[2] | {"prompt": CHANGES["prompt"]}]
    repaired = run(rows, "resume=true")["arms"][0]["requests"]
    assert repaired[:2] == begun[:2]
    assert repaired[2]["prompt"].startswith(CHANGES["prompt"])
    grown = run([*rows, ROWS[2] | {"id": "d"}], "resume=true")["arms"][0]["requests"]
    assert grown[:3] == repaired
    assert [one["id"] for one in grown] == ["a", "b", "c", "d"]


def test_a_finished_run_is_left_alone(run, caplog):
    first = run(ROWS)
    assert run(ROWS[::-1], "resume=true") == first  # the same ones in another order
    with pytest.raises(OutputExistsError, match=r"answers to 1 problems that are not asked now, such as 'a'"):
        run(ROWS[1:], "resume=true")
    assert "not known" not in caplog.text
    assert run(None, "resume=true") == first
    assert re.search("whether its problems have changed since is not known.*task.jsonl.*is not a file", caplog.text)
    assert run.loads == 1


@pytest.mark.parametrize("finished", [True, False])
def test_a_record_without_digests_is_resumed_as_long_as_its_requests_are_asked_again(finished, run, tmp_path):
    whole = run(ROWS)
    broken_off(tmp_path / "out", 3 if finished else 2, status="finished" if finished else "interrupted")
    path = tmp_path / "out" / "record.json"
    old = json.loads(path.read_text())
    del old["problems"]
    path.write_text(json.dumps(old))
    with pytest.raises(OutputExistsError, match="others now, such as 'a'"):
        run([ROWS[0] | {"reference": 9}, *ROWS[1:]], "resume=true")
    again = run(ROWS, "resume=true")
    assert [one["result"]["tokens"] for one in again["arms"][0]["requests"]] == [
        one["result"]["tokens"] for one in whole["arms"][0]["requests"]
    ]


def calibration(folder, n):
    cfg = composed("calibrate", f"labels.fit.n={n}", "labels.check.n=2", "resume=true")
    asked = asked_of(instantiate(cfg.labels).questions(cfg.seed))
    ours = {"samples": [{"id": name, "error": None} for name in asked], "answers": {}}
    return cfg, asked, ours, lambda: run_calibration(cfg, folder)


def advice(folder, n):
    cfg = composed("advise", f"n={n}", f"task.n={n}", "short=1", "rehearse=null", "resume=true")
    asked = digests({problem.id: problem for problem in instantiate(cfg.task).problems()})
    ours = {"trials": [{"id": name, "error": None} for name in asked], "rehearsal": {}, "check": {}}
    return cfg, asked, ours, lambda: run_advice(cfg, folder, lambda *_: pytest.fail("composed"))


def probes(folder, n):
    cfg = composed("train_probe", f"labels.fit.n={n}", f"output={folder}", "resume=true")
    cfg.combined.weights = str(folder / "probe")
    return cfg, asked_of(instantiate(cfg.labels).questions(cfg.seed)), {}, lambda: train_probes(cfg)


@pytest.mark.parametrize("command", [calibration, advice, probes])
def test_so_do_the_other_commands_that_can_be_gone_on_with(command, tmp_path):
    cfg, asked, ours, resume = command(tmp_path, 4)
    record = {"schema_version": SCHEMA_VERSION, "config": plain(cfg), "status": "finished", **ours}
    path = tmp_path / "record.json"
    path.write_text(json.dumps(record | {"problems": {**asked, max(asked): "another"}}))
    with pytest.raises(OutputExistsError, match=f"1 problems that are others now, such as {max(asked)!r}"):
        resume()
    for known in ({"problems": asked}, {}):  # none in the record of an earlier version
        path.write_text(json.dumps(earlier := record | known))
        assert resume() == earlier
