"""Code tasks: how an answer becomes a program, and what the sandbox stops."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from textwrap import indent

import pytest

from parsedec.errors import ConfigError
from parsedec.tasks import Code, Problem, TaskDataError
from parsedec.tasks.code import extract_code, function_under_test, program
from parsedec.tasks.sandbox import SandboxResult, run_sandboxed

HEAD = '''from typing import List


def helper(x):
    return x + 1


def bump(numbers: List[int]) -> List[int]:
    """ Add one to each number.
    """
'''
TEST = "def check(candidate):\n    assert candidate([1, 2]) == [2, 3], 'off by one'\n"
WHOLE = "def bump(numbers: List[int]) -> List[int]:\n    return [helper(x) for x in numbers]\n"
WRONG = WHOLE.replace("helper(x)", "x")
BODY = "    return [helper(x) for x in numbers]\n"


@pytest.fixture
def task(tmp_path: Path) -> Code:
    path = tmp_path / "humaneval.jsonl"
    stored = {"id": "bump", "prompt": HEAD, "reference": BODY, "meta": {"entry_point": "bump", "test": TEST}}
    path.write_text(json.dumps(stored) + "\n", encoding="utf-8")
    return Code(name="humaneval", path=path, n=1, timeout_s=5.0, memory_mb=512)


@pytest.fixture
def problem(task: Code) -> Problem:
    return task.problems()[0]


def run(*parts: str, timeout_s: float = 5.0, memory_mb: int = 512) -> SandboxResult:
    return run_sandboxed(parts, timeout_s=timeout_s, memory_mb=memory_mb)


# --- from an answer to a program ---


def test_prompt_shows_the_function_as_a_block(problem: Problem) -> None:
    assert problem.prompt.startswith("Answer with the whole function")
    assert problem.prompt.endswith("```python\n" + HEAD.rstrip() + "\n```")
    assert json.loads(json.dumps(problem.meta)) == problem.meta


@pytest.mark.parametrize(
    "text",
    [
        f"Here it is:\n```python\n{WHOLE}```\nIt adds one.",
        f"```\n{WHOLE}```",
        f"```py\n{WHOLE}",  # the closing fence was cut off by the token limit
        f"First a test:\n```python\nprint(1)\n```\nNow:\n```python\n{WHOLE}```",
        f"1. Like so:\n   ```python\n{WHOLE}   ```",
        f"1. Like so:\n\n{indent('```python' + chr(10) + WHOLE + '```', '   ')}\n\n2. Done.",
        f"Run it:\n```bash\npython bump.py\n```\nThe code:\n```python\n{WHOLE}```\n",
        f"It prints\n~~~text\n[2, 3]\n~~~\nwith\n~~~python\n{WHOLE}~~~",
        f"Sure! ```python\n{WHOLE}```",
        f'```python title="bump.py"\n{WHOLE}```',
        f"````python\n{WHOLE}````",
        f"```python\n{WHOLE}``` It adds one.",
        f"```python\nprint(1)\n```python\n{WHOLE}```",
        f"```python\n{WHOLE}```\n".replace("\n", "\r\n"),
        f"```python\n{WHOLE}".replace(":\n", ':\n    """Like so:\n\n    ```\n    bump([1])\n    ```\n    """\n')
        + "```",
        f"<think>Perhaps\n```python\n{WRONG}```\nNo.</think>\n```python\n{WHOLE}```",
        WHOLE,
        BODY,
        f"```python\n{BODY}```",
        HEAD + BODY,
    ],
)
def test_right_answers_pass(task: Code, problem: Problem, text: str) -> None:
    score = task.score(problem, text)
    assert score.correct, score.detail


@pytest.mark.parametrize(
    ("text", "detail"),
    [
        (WRONG, "AssertionError: off by one"),
        ("    return numbers\n", "AssertionError: off by one"),
        ("def bump(numbers):\n    return (", "SyntaxError"),
        ("", "AssertionError"),  # the bare head returns None
        ("I cannot do that.", "SyntaxError"),
        (WHOLE + "\nnote = '''", "SyntaxError"),  # must not swallow the tests
        (WHOLE + "\nif False:", "IndentationError"),
        ("import sys\nsys.exit(0)\n" + WHOLE, "SystemExit: 0"),
        ("import os\n" + WHOLE + "os._exit(0)\n", "ended with exit code 0 before its checks were done"),
        ("def bump(numbers):\n    import sys\n    sys.exit(0)\n", "SystemExit: 0"),
        ("import os\nos.write(1, b'passed')\nos._exit(0)\n" + WHOLE, "before its checks were done"),
    ],
)
def test_wrong_answers_do_not_pass(task: Code, problem: Problem, text: str, detail: str) -> None:
    score = task.score(problem, text)
    assert not score.correct
    assert detail in score.detail


def test_whole_function_keeps_imports_and_helpers_of_the_head() -> None:
    code = program(HEAD, "bump", WHOLE)
    assert code.count("def bump") == 1
    assert code.startswith("from typing import List")
    assert program(HEAD, "bump", BODY) == HEAD + BODY + "\n"


def test_a_name_that_only_begins_alike_is_not_the_function() -> None:
    assert extract_code("```python\ndef bumpy(): pass\n```\n```python\ndef bump(): pass\n```", "bump") == (
        "def bump(): pass\n"
    )
    assert "def bump(numbers" in program(HEAD, "bump", "def bumpy(): pass\n")


# --- the form of MBPP ---

ASSERTIONS = ["assert set(bump_all([1])) == {2}", "assert bump_all([0, 1]) == offset([1, 2])"]
WORDS = {
    "id": "mbpp/1",
    "prompt": "Write a function that adds one.",
    "reference": "",
    "meta": {"test_list": ASSERTIONS, "test_setup_code": "def offset(x): return x"},
}
ADDS_ONE = "def bump_all(numbers):\n    return [n + 1 for n in numbers]\n"


def test_words_with_assertions_are_a_code_task_too(tmp_path: Path) -> None:
    path = tmp_path / "mbpp.jsonl"
    path.write_text(json.dumps(WORDS) + "\n", encoding="utf-8")
    task = Code(name="mbpp", path=path, timeout_s=5.0, memory_mb=512)
    problem = task.problems()[0]
    assert problem.prompt.startswith("Write a function that adds one.\n\nAnswer with the whole function")
    for text in (ADDS_ONE, f"```python\nprint(1)\n```\nor\n```python\n{ADDS_ONE}```\nDone."):
        assert task.score(problem, text).correct
    assert task.score(problem, ADDS_ONE.replace("+ 1", "+ 2")).detail.startswith("AssertionError")
    assert task.score(problem, "").detail.startswith("NameError")
    path.write_text(json.dumps(WORDS | {"meta": {"test_list": []}}) + "\n", encoding="utf-8")
    with pytest.raises(TaskDataError, match=r"meta\.test_list=\[\]"):
        task.problems()


def test_the_function_under_test_is_the_one_all_assertions_call() -> None:
    assert function_under_test(ASSERTIONS) == "bump_all"
    assert function_under_test(["assert sum(1, 2) == 3"]) == "sum"  # the answer may hide one of Python's own
    assert function_under_test(["assert True"]) == ""


# --- the sandbox ---


def test_parts_run_in_order_in_one_namespace() -> None:
    assert run("x = 1", "assert x == 1") == SandboxResult(True, "passed")
    assert run("x = 1", "assert x == 2").detail == "AssertionError"
    assert run() == SandboxResult(True, "passed")


def test_endless_loop_is_killed() -> None:
    start = time.monotonic()
    assert run("while True: pass", timeout_s=0.5) == SandboxResult(False, "timed out after 0.5 s")
    assert time.monotonic() - start < 10


def test_sleep_is_killed_though_it_uses_no_cpu() -> None:
    assert not run("import time; time.sleep(60)", timeout_s=0.5).passed


def test_swallowing_every_exception_does_not_help() -> None:
    code = "while True:\n    try:\n        while True: pass\n    except BaseException: pass"
    assert run(code, timeout_s=0.5).detail.startswith("timed out")


def test_memory_hog_is_stopped() -> None:
    assert run("hog = bytearray(2 << 30)", memory_mb=256).detail.startswith("MemoryError")
    assert not run("hog = []\nwhile True: hog.append(bytearray(1 << 20))", memory_mb=256).passed


def test_children_die_with_the_group(tmp_path: Path) -> None:
    """A child left behind is killed both after a time-out and after a success."""
    for ending, passed in (("import time; time.sleep(60)", False), ("pass", True)):
        note = tmp_path / f"pid-{passed}"
        code = (
            "import subprocess, sys\n"
            "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
            f"open({str(note)!r}, 'w').write(str(child.pid))"
        )
        assert run(code, ending, timeout_s=1.5).passed == passed
        assert gone(int(note.read_text()))


def gone(pid: int) -> bool:
    """Whether a process has ended, zombies included: whoever adopts it may be slow to reap it."""
    for _ in range(100):
        try:
            os.kill(pid, 0)
            state = Path(f"/proc/{pid}/stat")
            if state.exists() and state.read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (ProcessLookupError, FileNotFoundError):
            return True
        time.sleep(0.05)
    os.kill(pid, signal.SIGKILL)
    return False


def test_environment_is_empty_and_folder_is_fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "abc")
    monkeypatch.setenv("PYTHONPATH", "/nowhere")
    assert run(
        "import os, sys",
        "assert 'SECRET_TOKEN' not in os.environ",
        "assert os.listdir() == []",
        "assert sys.flags.isolated",
    ) == SandboxResult(True, "passed")
    here = Path.cwd()
    assert run("open('left.txt', 'w').write('x')").passed
    assert not (here / "left.txt").exists()


def test_files_and_error_output_are_bounded() -> None:
    assert "File too large" in run("open('big', 'wb').write(bytes(64 << 20))").detail
    assert not run("import sys\nwhile True: sys.stderr.write('x' * 100_000)").passed


def test_reading_input_does_not_wait() -> None:
    assert run("input()").detail.startswith("EOFError")


def test_crash_is_reported_by_signal() -> None:
    assert run("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)").detail == "killed by signal 11"


def test_text_that_is_not_even_unicode_fails_quietly() -> None:
    assert not run("x = '\ud800'").passed
    assert not run("x = 1\0").passed


@pytest.mark.parametrize(
    ("timeout_s", "memory_mb", "part"),
    [(0, 512, "timeout_s=0"), (float("nan"), 512, "timeout_s=nan"), (1.0, 8, "memory_mb=8")],
)
def test_unusable_limits_are_named(tmp_path: Path, timeout_s: float, memory_mb: int, part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        run("pass", timeout_s=timeout_s, memory_mb=memory_mb)
    (tmp_path / "x.jsonl").touch()
    with pytest.raises(ConfigError, match=part):
        Code(name="code", path=tmp_path / "x.jsonl", timeout_s=timeout_s, memory_mb=memory_mb)
