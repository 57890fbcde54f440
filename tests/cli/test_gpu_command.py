"""experiments/gpu.py on tiny shapes: stages, the record and its table, and what is left when something goes wrong."""

import time
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from torch._dynamo.exc import TorchDynamoException

import commands
from parsedec.errors import ConfigError
from parsedec.experiment.record import read_record
from parsedec.hardware import claims, gpu
from parsedec.hardware.gpu import Measurement
from parsedec.hardware.stages import Clock

ROOT = Path(__file__).resolve().parents[2]
SMALL = [
    "runtime=auto", "runtime.device=cpu", "runtime.threads=1", "target.dtype=float32", "target.source=replay:tiny",
    "draft.model.source=replay:tiny_draft", "also=replay:tiny_draft", "max_new_tokens=8", "segmenter.delta=2",
    "task.n=1", "task.words=6", "context=16", "nodes=8", "repeats=2", "judge_pass={draft:12,probes:4,suffix:6}",
    "long_pass={draft:40,probes:8,suffix:6}", "kernels=[sdpa,cascade]", "hf.max_new_tokens=3", "prepare=[target,draft]",
    *(f"~arms.{name}" for name in (
        "parse_95", "parse_85", "parse_eagle3_85", "parse_both_85", "parse_both_60", "streamed_narrow_100",
        "parse_eagle3_10", "streamed_eagle3_10", "streamed_narrow_eagle3_10")),
]  # fmt: skip


@pytest.fixture
def measurement(tmp_path):
    """In this process, with more settings and so many minutes."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):

        def made(*overrides, minutes=5.0):
            overrides = [*SMALL, *overrides]
            cfg = compose("gpu", overrides=[*overrides, "output=unused"])
            clock = Clock.of(minutes, time.monotonic())
            return Measurement(cfg, tmp_path / "run", overrides, clock, ROOT)

        yield made


def stages(record):
    return {stage["name"]: stage["status"] for stage in record["stages"]}


def only(*names):
    """Settings that leave the other stages out."""
    known = ("prepare", "tests", "target", "draft", "hf", "also", "replay", "long", "kernels")
    return [f"~stages.{name}" for name in known if name not in names]


def test_all_stages_leave_a_record_and_its_table(tmp_path):
    done = commands.run("gpu.py", *SMALL, f"output={tmp_path / 'run'}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    path = Path(done.stdout.strip().splitlines()[-1])
    record = read_record(path)
    assert record["status"] == "finished"
    assert set(stages(record).values()) == {"finished"}, record["stages"]
    assert path.with_name("table.md").read_text() == claims.markdown(record)
    lines = {claim.what: claim for claim in claims.claims(record)}
    unmeasured = {what for what, claim in lines.items() if claim.measured is None}
    assert not any("replay" in what or "token" in what or "rows" in what for what in unmeasured)
    assert {"parse_60 over target, 50 % kept", "streamed_100 over parse_100, in time"} <= set(lines) - unmeasured
    assert len(record["floors"]["rows"]) == 2 + 1 + 2 + 1 + 1 + 2
    by_name = {arm["name"]: arm["summary"] for arm in record["replay"]["arms"]}
    assert "hf_generate" not in by_name
    assert {summary["new_tokens"] for summary in by_name.values()} == {8}
    assert by_name["parse_60"]["kept_draft_tokens"] == 4 < by_name["parse_100"]["kept_draft_tokens"] == 8
    assert [arm["summary"]["new_tokens"] for arm in record["hf"]["arms"]] == [3, 3]
    assert record["captured_late"] == {"hf": 0, "replay": 0}
    assert (path.parent / "replay" / "trace.html").exists()


def test_what_does_not_fit_is_skipped(measurement):
    record = measurement(*only("target", "draft", "replay"), "stages.draft.seconds=1", "stages.target.seconds=1",
                         "stages.replay.seconds=40", "stages.draft.yields_to=[]", minutes=0.5).run()  # fmt: skip
    assert stages(record) == {"target": "skipped", "draft": "finished", "replay": "skipped"}
    assert "beside the 40 s of stages behind it" in record["stages"][0]["note"]


def test_a_stage_that_raises_costs_no_other(measurement, monkeypatch):
    def fail(*_):
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(gpu, "judge_passes", fail)
    record = measurement(*only("target", "draft", "long")).run()
    assert stages(record) == {"target": "failed", "draft": "finished", "long": "failed"}
    assert len(record["floors"]["rows"]) == 4, "the steps of the target were there already"
    assert any("the device is gone" in stage["note"] for stage in record["stages"])


def test_a_compiler_that_fails_is_done_without(measurement, monkeypatch):
    stances, runs, compared = [], [], Measurement._compare

    def failing(self, name, arms, *changes):
        runs.append(name)
        if len(runs) == 1:
            raise TorchDynamoException("no compiler\nand much more")
        compared(self, name, arms, *changes)

    monkeypatch.setattr(Measurement, "_compare", failing)
    monkeypatch.setattr(torch.compiler, "set_stance", stances.append)
    record = measurement(*only("prepare")).run()
    assert runs == ["prepare/target", "prepare/target_uncompiled", "prepare/draft"]
    assert stances == ["force_eager"]
    assert stages(record) == {"prepare": "finished"}
    assert "Without torch.compile: TorchDynamoException: no compiler." in claims.caption(record)
    assert any("goes on without torch.compile" in warning for warning in record["warnings"])


@pytest.mark.parametrize(
    ("fails", "left"),
    [("streamed_100", {"target", "draft", "eagle3", "draft_eagle3", "parse_60", "parse_eagle3_60", "parse_100"}),
     ("eagle3", {"target", "draft", "draft_eagle3", "parse_60", "parse_100", "streamed_100"}),
     ("draft", {"target", "eagle3", "draft_eagle3", "parse_60", "parse_eagle3_60", "parse_100", "streamed_100"}),
     ("target", None)],
)  # fmt: skip
def test_an_arm_that_fails_costs_those_made_of_the_same_parts(measurement, monkeypatch, fails, left):
    asked = {}

    def comparing(self, name, arms, *changes):
        asked[name] = set(arms)
        if name == f"prepare/{fails}":
            raise RuntimeError("an illegal memory access")

    monkeypatch.setattr(Measurement, "_compare", comparing)
    record = measurement(*only("prepare", "replay"), f"prepare=[target,{fails}]").run()
    assert asked["replay"] == left or left is None
    assert stages(record)["prepare"] == ("finished" if left else "failed")
    assert (fails in claims.caption(record)) is (left is not None)


def test_an_interruption_leaves_what_was_measured(measurement, tmp_path, monkeypatch):
    answered, generate = [], gpu.run_comparison.__globals__["run_arms"]

    def interrupted(arms, task, problems, settings, after_each):
        def counting(name):
            answered.append(name)
            after_each(name)
            if len(answered) == 3:
                raise KeyboardInterrupt

        generate(arms, task, problems, settings, counting)

    monkeypatch.setitem(gpu.run_comparison.__globals__, "run_arms", interrupted)
    with pytest.raises(KeyboardInterrupt):
        measurement(*only("draft", "replay", "long")).run()
    record = read_record(tmp_path / "run" / "record.json")
    assert record["status"] == "interrupted"
    assert stages(record) == {"draft": "finished", "replay": "interrupted"}
    assert [len(arm["requests"]) for arm in record["replay"]["arms"][:4]] == [1, 1, 1, 0]
    assert (tmp_path / "run" / "table.md").read_text() == claims.markdown(record)
    told = next(claim for claim in claims.claims(record) if claim.what == "draft over target")
    assert (told.n, told.measured is not None) == (1, True)
    # as after a kill in the middle of the replay: its own record is there, and a report takes it
    killed = {key: value for key, value in record.items() if key != "replay"}
    assert claims.with_runs(killed, tmp_path / "run")["replay"] == record["replay"]


def test_a_stage_nobody_knows_is_refused(measurement):
    with pytest.raises(ConfigError, match="rehearsal"):
        measurement("+stages.rehearsal={seconds:1}")
    with pytest.raises(ConfigError, match="replays"):
        measurement("stages.draft.yields_to=[replays]")
