"""The run command with what users do to it: one line that says what to do, exit code 2, and nothing overwritten.

One command for each way through the program; the messages themselves are tests/unit/test_errors.py.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import commands

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["task.n=2", "warmup=0", "max_new_tokens=16", "runtime=cpu"]


def run(folder, *overrides):
    return commands.run("run.py", *SMALL, f"output={folder}", *overrides, cwd=folder.parent, timeout=120)


def refusal(folder, *overrides):
    """What is said about a command that is refused, on one line of stderr."""
    done = run(folder, *overrides)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    return next(line for line in done.stderr.splitlines() if line.startswith("error:"))


def recorded(folder):
    return json.loads((folder / "record.json").read_text())


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "out"


def test_help_says_what_the_command_does_and_every_setting(folder):
    done = run(folder, "inner=medusa", "--help")
    assert done.returncode == 0
    for said in ("write its record", "run.py inner=draft_model", "gate: adaptive, always", "heads: "):
        assert said in done.stdout
    assert not folder.exists()


@pytest.mark.skipif(os.name == "nt", reason="another kind of pipe")
def test_help_whose_reader_has_read_enough_says_nothing_of_folders():
    reader, writer = os.pipe()
    os.close(reader)
    script = ROOT / "experiments" / "run.py"
    with os.fdopen(writer) as stdout:
        done = subprocess.run(
            [sys.executable, script, "--help"],
            env=commands.ENVIRONMENT,
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert (done.returncode, done.stderr) == (1, "")


def test_unknown_setting(folder):
    said = refusal(folder, "judge.pth=packed")
    assert "'judge.pth'" in said
    assert "Did you mean judge.path" in said
    assert "--help" in said
    assert not folder.exists()


def test_an_output_that_cannot_be_a_folder(folder):
    folder.write_text("precious")
    said = refusal(folder)
    assert f"the output folder cannot be made: [Errno 17] File exists: '{folder}'" in said
    assert "output=DIR" in said
    assert folder.read_text() == "precious"


def test_an_output_without_a_name_is_not_the_current_folder(tmp_path):
    done = commands.run("run.py", *SMALL, "output=", cwd=tmp_path, timeout=120)
    assert done.returncode == 2
    assert "error: output is empty; expected a folder: output=DIR." in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_damaged_checkpoint(folder, tmp_path):
    model = tmp_path / "half a model"
    shutil.copytree(ROOT / "parse" / "parsedec" / "zoo" / "draft", model)
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    said = refusal(folder, f"draft={model}")
    assert f"cannot load the model '{model}'" in said
    assert "download or copy is complete" in said
    assert not (folder / "record.json").exists()


def test_a_folder_with_a_record_is_refused_and_left_alone(folder):
    folder.mkdir()
    (folder / "record.json").write_text("precious")
    said = refusal(folder)
    assert str(folder / "record.json") in said
    assert "output=DIR" in said
    assert "resume=true" in said
    assert (folder / "record.json").read_text() == "precious"
    assert os.listdir(folder) == ["record.json"]


def test_resuming_answers_only_what_is_missing(folder):
    """A record of three requests loses two of them; the command brings them back."""
    first = run(folder, "task.n=3")
    assert first.returncode == 0, first.stderr
    whole = recorded(folder)
    part = json.loads(json.dumps(whole)) | {"status": "interrupted"}
    del part["arms"][0]["requests"][1:]
    (folder / "record.json").write_text(json.dumps(part))

    done = run(folder, "task.n=3", "resume=true")

    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(folder / "record.json")
    after = recorded(folder)
    assert (after["status"], after["resumed_from"]) == ("finished", part["provenance"])
    before, now = (record["arms"][0]["requests"] for record in (part, after))
    assert now[0] == before[0]  # its clock readings included: it was not answered again
    answers = [[request["result"]["tokens"] for request in record["arms"][0]["requests"]] for record in (whole, after)]
    assert answers[0] == answers[1]
    assert after["summary"]["requests"] == 3

    again = run(folder, "task.n=4", "resume=true")  # the same run with more problems
    assert again.returncode == 0, again.stderr
    requests = recorded(folder)["arms"][0]["requests"]
    assert len(requests) == 4 == recorded(folder)["config"]["task"]["n"]
    assert requests[:3] == after["arms"][0]["requests"]

    said = refusal(folder, "task.n=1", "resume=true")  # with fewer, answers would be lost
    assert "3 problems that are not asked now" in said
    assert recorded(folder)["arms"][0]["requests"] == requests


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals to send")
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_saves_what_is_finished(folder, sent):
    process = subprocess.Popen(
        [sys.executable, ROOT / "experiments" / "run.py", *SMALL, "task.n=400", f"output={folder}"],
        cwd=folder.parent, env=commands.ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # a test run in the background ignores Ctrl-C, and its children would inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        while not (folder / "record.json").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        assert process.poll() is None, process.communicate()[1]
        running = recorded(folder)
        process.send_signal(sent)
        stdout, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert stdout.splitlines()[-1] == str(folder / "record.json")
    assert "Traceback" not in stderr
    assert "resume=true" in stderr
    saved = recorded(folder)
    assert (running["status"], saved["status"]) == ("running", "interrupted")
    first, all_saved = (record["arms"][0]["requests"] for record in (running, saved))
    assert len(first) >= 1
    assert all_saved[: len(first)] == first
    assert len(all_saved) < 400
    assert all(request["result"]["tokens"] for request in all_saved)
    assert saved["summary"]["requests"] == len(all_saved)
