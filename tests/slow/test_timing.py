"""What the project promises of time, measured on the embedded models by the commands users run. Machines are noisy:
arms alternate, ratios are asserted, and the bounds are the promised ones."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow


def record_of(script, *overrides, folder):
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "parse"), str(ROOT / "adapters")])}
    done = subprocess.run(
        [sys.executable, ROOT / "experiments" / script, "runtime=cpu", f"output={folder}", *overrides],
        env=env, text=True, capture_output=True, timeout=1200, check=True)  # fmt: skip
    return json.loads(Path(done.stdout.strip().splitlines()[-1]).read_text())


def test_the_engine_costs_at_most_a_twentieth(tmp_path):
    summary = record_of("overhead.py", "task.n=20", "inners=[]", folder=tmp_path)["summary"]
    assert summary["equal"]
    assert summary["ratio"] <= 1.05


def test_the_adaptive_gate_bounds_the_slowdown_when_all_is_refused(tmp_path):
    record = record_of("compare.py", "arms=refused", "task.n=100", folder=tmp_path)
    rows = {row["arm"]: row for row in record["comparison"]}
    assert {arm["name"]: arm["summary"]["kept_draft_tokens"] for arm in record["arms"]} == {
        "target": 0, "always": 0, "adaptive": 0}  # fmt: skip
    assert 1 / rows["adaptive"]["time_ratio"] < 1.10
    assert rows["always"]["time_ratio"] < rows["adaptive"]["time_ratio"]


def test_parse_keeps_the_accuracy_of_the_target(tmp_path):
    """With the thresholds of the shipped judge card, on 200 unseen problems: within a point."""
    record = record_of("compare.py", "task.n=200", "~arms.draft", "~arms.inner", "~arms.parse_inner", folder=tmp_path)
    (row,) = record["comparison"]
    assert row["accuracy_change"] >= -0.01
    assert row["requests"] == 200
