"""Sweeps: a job a folder, what is finished is skipped, a killed sweep goes on to the same records, and the table.

Oracle of the kill test: the records of the same sweep, left alone.
"""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf

from parsedec.experiment.job import run_job
from parsedec.experiment.record import SCHEMA_VERSION, read_record, write_record
from parsedec.experiment.summary import summarise
from parsedec.experiment.sweep import read_sweep, write_sweep

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["runtime=cpu", "warmup=0", "max_new_tokens=64"]
TIMES = ("_s", "speed", "per_s")


def command(folder, *overrides):
    return [
        sys.executable, str(ROOT / "experiments" / "run.py"), "--multirun", *SMALL, *overrides,
        f"hydra.sweep.dir={folder}"]  # fmt: skip


def environment():
    paths = os.pathsep.join(str(ROOT / name) for name in ("parse", "adapters"))
    return os.environ | {"PYTHONPATH": paths, "OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1"}


def swept(folder, *overrides):
    done = subprocess.run(
        command(folder, *overrides), cwd=folder.parent, env=environment(), capture_output=True, text=True, timeout=600,
        check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done


def untimed(value):
    """A record without what two equal runs may differ in: seconds, and when and by what command it was made."""
    if isinstance(value, dict):
        apart = {"provenance", "resumed_from", "entropy", "config"}
        kept = {k: v for k, v in value.items() if k not in apart and not any(mark in k for mark in TIMES)}
        return {key: untimed(item) for key, item in kept.items()}
    return [untimed(item) for item in value] if isinstance(value, list) else value


def answers(folder):
    return {
        job: [(r["id"], r["seed"], untimed(r["result"])) for arm in record["arms"] for r in arm["requests"]]
        for job, record in read_sweep(folder)
    }


@pytest.mark.slow
def test_a_killed_sweep_goes_on_to_the_same_records(tmp_path):
    grid = ["boundary.threshold=0.6,0.9", "inner=none,ngram", "task.n=3", "resume=true"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    swept(whole, *grid)
    process = subprocess.Popen(
        command(killed, *grid), cwd=tmp_path, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 300
    while not (killed / "1" / "record.json").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = {path: path.stat().st_mtime_ns for path in killed.glob("*/record.json") if _status(path) == "finished"}
    assert finished
    assert len(list(killed.glob("*/record.json"))) < 4
    again = swept(killed, *grid)
    assert again.stderr.count("is finished already") == len(finished)
    assert all(path.stat().st_mtime_ns == then for path, then in finished.items())
    assert answers(killed) == answers(whole)
    assert {record["status"] for _, record in read_sweep(killed)} == {"finished"}
    table = list(csv.DictReader((killed / "sweep.csv").open()))
    assert [(row["job"], row["boundary.threshold"], row["inner"]) for row in table] == [
        ("0", "0.6", "none"), ("1", "0.6", "ngram"), ("2", "0.9", "none"), ("3", "0.9", "ngram")]  # fmt: skip


def _status(path):
    return read_record(path)["status"]


@pytest.mark.slow
def test_submitit_on_this_machine_runs_the_jobs(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="pip install -e '.[sweeps]'")
    folder = tmp_path / "sweep"
    swept(folder, "inner=none,ngram", "task.n=2", "outer=none", "hydra/launcher=slurm_local")
    records = read_sweep(folder)
    assert [job for job, _ in records] == ["0", "1"]
    assert {record["status"] for _, record in records} == {"finished"}
    assert (folder / "sweep.md").read_text().count("\n| ") == 4  # heads, rule, a row each
    first, second = answers(folder).values()
    assert [r[2]["tokens"] for r in first] == [r[2]["tokens"] for r in second]  # the inner level is lossless


def test_a_finished_run_is_skipped_without_loading_anything(tmp_path, caplog):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("config", overrides=["resume=true", "output=elsewhere", "runtime=cpu"])
    config = OmegaConf.to_container(cfg, resolve=True)
    asked = [{"id": p.id, "prompt": p.prompt, "reference": p.reference} for p in instantiate(cfg.task).problems()]
    record = {
        "schema_version": SCHEMA_VERSION, "status": "finished", "config": config, "provenance": {},
        "arms": [{"name": "run", "requests": [one | {"error": None} for one in asked]}]}  # fmt: skip
    write_record(record, tmp_path / "record.json")
    with caplog.at_level("INFO"):
        assert run_job(cfg, tmp_path, lambda: pytest.fail("loaded")) == record
    assert "skipped" in caplog.text
    record["arms"][0]["requests"][0]["error"] = "failed"
    write_record(record, tmp_path / "record.json")
    with pytest.raises(pytest.fail.Exception, match="loaded"):  # what failed is tried again
        run_job(cfg, tmp_path, lambda: pytest.fail("loaded"))


def job(folder, overrides, status="finished"):
    summary = summarise([])
    made = {"device": "CPU", "git_sha": "0" * 40, "git_dirty": False, "packages": {"torch": "2", "transformers": "5"}}
    record = {
        "schema_version": SCHEMA_VERSION, "status": status, "overrides": overrides, "provenance": made, "config": {},
        "arms": [{"name": "run", "summary": summary, "requests": []}]}  # fmt: skip
    write_record(record, folder / "record.json")


def test_the_table_shows_what_differs_and_only_that(tmp_path):
    for i in range(11):
        overrides = ["task.n=4", f"boundary.threshold={i / 20}", "resume=true", "inner=none"]
        job(tmp_path / str(i), overrides, "interrupted" if i == 3 else "finished")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "record.json").write_text(json.dumps({"schema_version": 99}))
    _, table = write_sweep(tmp_path)
    rows = list(csv.DictReader(table.open()))
    assert [row["job"] for row in rows] == [str(i) for i in range(11)]
    assert [float(row["boundary.threshold"]) for row in rows] == [i / 20 for i in range(11)]
    assert not {"task.n", "inner", "resume"} & set(rows[0])
    assert [row["status"] for row in rows].count("interrupted") == 1
    assert (tmp_path / "sweep.md").read_text().count("\n| ") == 13


def test_no_records_no_table(tmp_path):
    assert write_sweep(tmp_path) is None
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("launcher", sorted(path.stem for path in (ROOT / "conf/hydra/launcher").glob("*.yaml")))
def test_launchers_compose(launcher):
    """Their settings are known to the plugin's own schema; the plugin has to be there."""
    plugin = "hydra_ray_launcher" if launcher.startswith("ray") else "hydra_submitit_launcher"
    pytest.importorskip(f"hydra_plugins.{plugin}", reason="pip install -e '.[sweeps,sweeps-ray]'")
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("config", overrides=[f"hydra/launcher={launcher}"], return_hydra_config=True)
    chosen = OmegaConf.load(ROOT / f"conf/hydra/launcher/{launcher}.yaml")
    assert set(chosen) - {"defaults"} <= set(cfg.hydra.launcher)
    assert plugin in cfg.hydra.launcher._target_
