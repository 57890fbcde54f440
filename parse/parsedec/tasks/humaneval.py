"""HumanEval: complete a Python function, scored by unit tests (Chen et al. 2021, arXiv 2107.03374).

The answer is run. The sandbox keeps it from hanging or filling memory, but it is no security boundary: see
`parsedec.tasks.sandbox` for what it does not do.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import ClassVar

from parsedec.tasks.base import Problem, Score
from parsedec.tasks.jsonl import JsonlTask, TaskDataError
from parsedec.tasks.sandbox import require_limits, run_sandboxed

INSTRUCTION = "Complete this Python function. Answer with the whole function in one ```python code block."

# An unclosed fence reaches to the end: the token limit may have struck after the code was done.
_FENCED = re.compile(r"(?msi)^[ \t]*```[ \t]*(?:python3?|py)?[ \t]*\n(.*?)(?:^[ \t]*```|\Z)")


@dataclass(frozen=True, kw_only=True)
class HumanEval(JsonlTask):
    """Problems from a local file whose `meta` holds `entry_point` and `test`.

    instruction  put before the function's head, which is shown as a code block
    timeout_s    wall-clock seconds an answer may run
    memory_mb    address space it may use
    """

    name: ClassVar[str] = "humaneval"
    n: int | None = 10
    instruction: str = INSTRUCTION
    timeout_s: float = 10.0
    memory_mb: int = 1024

    def __post_init__(self) -> None:
        super().__post_init__()
        require_limits(self.timeout_s, self.memory_mb)

    def prepare(self, problem: Problem) -> Problem:
        for key in ("entry_point", "test"):
            value = problem.meta.get(key)
            if not isinstance(value, str) or not value.strip():
                raise TaskDataError(
                    f"{self.path}: problem {problem.id!r} has meta.{key}={value!r}; expected "
                    "text. Is this another benchmark's file? Change path or repair the line."
                )
        prompt = f"{self.instruction}\n\n```python\n{problem.prompt.rstrip()}\n```"
        return replace(problem, prompt=prompt, meta={**problem.meta, "head": problem.prompt})

    def score(self, problem: Problem, text: str) -> Score:
        meta = problem.meta
        answer = program(meta["head"], meta["entry_point"], text)
        parts = [answer, meta["test"], f"check({meta['entry_point']})"]
        result = run_sandboxed(parts, timeout_s=self.timeout_s, memory_mb=self.memory_mb)
        return Score(result.passed, result.detail)


def program(head: str, entry_point: str, text: str) -> str:
    """The module an answer stands for.

    A whole function is put after what stands above it in `head` (imports, helpers), as a person would paste
    it; anything else is taken as the continuation of `head`.
    """
    code = extract_code(text, entry_point)
    if not _defines(entry_point, code):
        return f"{head.rstrip()}\n{code}\n"
    above = re.split(_definition(entry_point), head, maxsplit=1, flags=re.MULTILINE)[0]
    return f"{above}\n{code}\n"


def extract_code(text: str, entry_point: str) -> str:
    """The fenced block that defines `entry_point`, else the first fenced block, else the text as it is."""
    blocks = [str(block) for block in _FENCED.findall(text)]
    if not blocks:
        return text
    return next((block for block in blocks if _defines(entry_point, block)), blocks[0])


def _defines(entry_point: str, code: str) -> bool:
    return re.search(_definition(entry_point), code, flags=re.MULTILINE) is not None


def _definition(entry_point: str) -> str:
    # at the start of a line: an inner function of the same name would not be the answer
    return rf"^(?:async[ \t]+)?def[ \t]+{re.escape(entry_point)}[ \t]*\("
