"""The CUDA tests as a process beside: what they said, that they are ended in time, and why they did not run."""

import os
import time

import pytest
import torch

from parsedec.hardware import cuda_tests
from parsedec.hardware.cuda_tests import CudaTests

BODIES = {"passes": "pass", "fails": "assert 0", "hangs": "import time; time.sleep(60)"}


@pytest.fixture
def started(tmp_path, monkeypatch):
    """Tests of a checkout that holds one, as if there were a device."""
    monkeypatch.setattr(cuda_tests, "_obstacle", lambda root, paths: None)

    def start(body, seconds=60.0):
        marked = f"import pytest\n@pytest.mark.gpu\ndef test_it():\n    {body}\ndef test_another():\n    assert 0\n"
        (tmp_path / "test_device.py").write_text(marked)
        return CudaTests(tmp_path, ["test_device.py"], seconds, tmp_path / "out" / "tests.txt")

    return start


@pytest.mark.parametrize(("body", "passed"), [("passes", True), ("fails", False)])
def test_what_they_said_is_kept(started, body, passed, tmp_path):
    found = started(BODIES[body]).result(60)
    assert found["passed"] is passed
    assert found["said"].startswith("1 passed" if passed else "1 failed")
    assert found["last"][-1].strip("= ") == found["said"]
    assert found["said"] in (tmp_path / "out" / "tests.txt").read_text()


@pytest.mark.parametrize(("seconds", "most"), [(0.5, 60), (60, 0.5)])
def test_they_are_ended_when_their_time_is_up(started, seconds, most):
    tests, began = started(BODIES["hangs"], seconds), time.monotonic()
    found = tests.result(most)
    assert time.monotonic() - began < 20
    assert found["passed"] is None
    assert found["said"].startswith("ended after")
    with pytest.raises(ProcessLookupError):
        os.kill(tests._process.pid, 0)
    tests.end()


def test_why_they_did_not_run_is_said(tmp_path, monkeypatch):
    def said(*paths):
        found = CudaTests(tmp_path, paths, 60, tmp_path / "tests.txt").result(60)
        assert found["passed"] is None
        return found["said"]

    assert said() == "not run: none were asked for"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert said("tests/gpu") == "not run: no CUDA device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert said("tests/gpu") == f"not run: {tmp_path} has no tests/gpu"
