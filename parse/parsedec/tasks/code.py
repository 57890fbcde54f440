"""Python functions scored by running them: HumanEval (arXiv 2107.03374) and MBPP (arXiv 2108.07732).

Answers are run. The sandbox keeps them from hanging or filling memory, but it is not a security boundary:
`parsedec.tasks.sandbox` says what it does not do.
"""

from __future__ import annotations

import ast
import builtins
import re
from dataclasses import dataclass, replace
from typing import Any

from parsedec.tasks.base import Problem, Score, TaskDataError
from parsedec.tasks.jsonl import JsonlTask
from parsedec.tasks.sandbox import require_limits, run_sandboxed

_FENCE = re.compile(r"(?P<before>[^`~]*)(?P<marks>`{3,}|~{3,})[ \t]*(?P<told>[^`]*)")
_LIST = re.compile(r"[ \t]*(?:[-*+]|\d+[.)])?[ \t]*")  # before an opening fence, in a list or not
_PYTHON = re.compile(r"[{.]*(?:python3?|py3?)(?![\w+#-])", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Code(JsonlTask):
    """Problems in one of two forms, distinguished by their `meta`:

    HumanEval   the prompt is a function's head; `entry_point` names it and `test` defines check(function)
    MBPP        the prompt is prose; `test_list` holds assertions, `test_setup_code` the code they need

    instruction  put before a function's head, which is shown as a code block, or after prose; "": nothing
    timeout_s    wall-clock seconds an answer may run
    memory_mb    address space an answer may use, in MiB
    """

    instruction: str = "Answer with the whole function in one ```python code block."
    timeout_s: float = 10.0
    memory_mb: int = 1024

    def __post_init__(self) -> None:
        super().__post_init__()
        require_limits(self.timeout_s, self.memory_mb)

    def prepare(self, problem: Problem) -> Problem:
        if "test_list" in problem.meta:
            return self._words(problem)
        for key in ("entry_point", "test"):
            value = problem.meta.get(key)
            if not isinstance(value, str) or not value.strip():
                raise TaskDataError(
                    f"{self.source}: problem {problem.id!r} has meta.{key}={value!r}; expected "
                    "text. Is this another benchmark's file? Change path or repair the line."
                )
        lead = f"{self.instruction}\n\n" if self.instruction else ""
        prompt = f"{lead}```python\n{problem.prompt.rstrip()}\n```"
        return replace(problem, prompt=prompt, meta={**problem.meta, "head": problem.prompt})

    def _words(self, problem: Problem) -> Problem:
        tests, setup = problem.meta["test_list"], problem.meta.get("test_setup_code", "")
        if not tests or not all(isinstance(part, str) for part in (*tests, setup)):
            raise TaskDataError(
                f"{self.source}: problem {problem.id!r} has meta.test_list={tests!r}; expected assertions. "
                "Is this another benchmark's file? Change path or repair the line."
            )
        prompt = f"{problem.prompt.rstrip()}\n\n{self.instruction}" if self.instruction else problem.prompt
        return replace(problem, prompt=prompt)

    def score(self, problem: Problem, text: str) -> Score:
        result = run_sandboxed(_parts(problem.meta, text), timeout_s=self.timeout_s, memory_mb=self.memory_mb)
        return Score(result.passed, result.detail)


def _parts(meta: Any, text: str) -> list[str]:
    """The code to run, in this order: the answer, then its tests."""
    if "test_list" in meta:
        wanted = function_under_test(meta["test_list"])
        return [extract_code(text, wanted), meta.get("test_setup_code", ""), *meta["test_list"]]
    answer = program(meta["head"], meta["entry_point"], text)
    return [answer, meta["test"], f"check({meta['entry_point']})"]


def function_under_test(tests: list[str]) -> str:
    """The function that all assertions call, preferably not a builtin such as `set` around the result; "" if none."""
    called = [
        [
            node.func.id
            for node in ast.walk(ast.parse(test))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        ]
        for test in tests
    ]
    shared = [name for name in called[0] if all(name in names for names in called)]
    own = [name for name in shared if not hasattr(builtins, name)]
    return next(iter(own or shared), "")


def program(head: str, entry_point: str, text: str) -> str:
    """The module that an answer amounts to.

    A whole function is put after the part of `head` above it (imports, helpers), as a person would paste it. Anything
    else is taken as a continuation of `head`.
    """
    code = extract_code(text, entry_point)
    if not _defines(entry_point, code):
        return f"{head.rstrip()}\n{code}\n"
    above = re.split(_definition(entry_point), head, maxsplit=1, flags=re.MULTILINE)[0]
    return f"{above}\n{code}\n"


def extract_code(text: str, entry_point: str) -> str:
    """The fenced block that defines `entry_point`, else the first fenced block, else the text as it is. What a
    reasoning model thinks before its answer is left out."""
    text = text.rpartition("</think>")[2]
    blocks = fenced_blocks(text)
    if not blocks:
        return text
    return next((block for block in blocks if _defines(entry_point, block)), blocks[0])


def fenced_blocks(text: str) -> list[str]:
    """The code in Markdown fences marked as Python or as no language, without the indentation of a list around them.

    As in CommonMark (section 4.5), a block ends at a fence no shorter than its first and indented by at most three more
    columns, so that a fence in a docstring ends nothing. An unclosed block reaches to the end of the text, since the
    token limit may have struck after the code was done. Unlike CommonMark, words around a fence are ignored where they
    leave no doubt.
    """
    blocks = []
    lines = text.replace("\r\n", "\n").split("\n")
    at = 0
    while at < len(lines):
        opening = _opening(lines[at])
        at += 1
        if opening is None:
            continue
        end = next((i for i in range(at, len(lines)) if _closes(lines[i], opening)), len(lines))
        if not opening["told"].strip() or _PYTHON.match(opening["told"]):
            blocks.append(_outdented(lines[at:end], len(opening["before"])))
        opens_again = end < len(lines) and _PYTHON.match(lines[end].lstrip(" \t`~"))
        at = end if opens_again else end + 1
    return blocks


def _opening(line: str) -> re.Match[str] | None:
    fence = _FENCE.fullmatch(line)
    if fence is None or _LIST.fullmatch(fence["before"]) or _PYTHON.match(fence["told"]):
        return fence
    return None  # words before the fence, and no sign that it holds code


def _closes(line: str, opening: re.Match[str]) -> bool:
    indent = len(line) - len(line.lstrip())
    return indent < len(opening["before"]) + 4 and line.lstrip().startswith(opening["marks"])


def _outdented(lines: list[str], columns: int) -> str:
    """The lines without the first one's indentation, but removing no more than the fence's."""
    first = next((line for line in lines if line.strip()), "")
    indent = re.compile(f"[ \\t]{{0,{min(columns, len(first) - len(first.lstrip()))}}}")
    return "".join(indent.sub("", line, count=1) + "\n" for line in lines)


def _defines(entry_point: str, code: str) -> bool:
    return re.search(_definition(entry_point), code, flags=re.MULTILINE) is not None


def _definition(entry_point: str) -> str:
    # at the start of a line: an inner function of the same name would not be the answer
    return rf"^(?:async[ \t]+)?def[ \t]+{re.escape(entry_point)}[ \t]*\("
