"""GSM8K: grade-school word problems (Cobbe et al. 2021, arXiv 2110.14168), scored by the final number alone.

The final number of an answer is, in this order: the one after the last `####`, the one in the last
`\\boxed{}`, the last one anywhere. `,` `$` `%` and a trailing `.` are dropped; then numbers are compared.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import ClassVar

from parsedec.tasks.base import Problem, Score
from parsedec.tasks.jsonl import JsonlTask, TaskDataError

INSTRUCTION = "Reason step by step. Finish with the line '#### N', where N is the answer as a number."

# A minus sign counts only where it cannot be a subtraction: "10-5" ends with 5, "= -5" with -5.
_NUMBER = re.compile(r"(?:(?<![\w)])[-\u2212])?(?:\$[-\u2212]?)?(?:[0-9]+(?:,[0-9]+)*(?:\.[0-9]+)?|\.[0-9]+)")


@dataclass(frozen=True, kw_only=True)
class Gsm8k(JsonlTask):
    """Problems from a local file; `instruction` is appended to each question after an empty line."""

    name: ClassVar[str] = "gsm8k"
    n: int | None = 20
    instruction: str = INSTRUCTION

    def prepare(self, problem: Problem) -> Problem:
        if _as_number(problem.reference) is None:
            raise TaskDataError(
                f"{self.path}: problem {problem.id!r} has reference={problem.reference!r}; "
                "expected a number. Is this another benchmark's file? Change path, or repair "
                "the line."
            )
        prompt = f"{problem.prompt}\n\n{self.instruction}" if self.instruction else problem.prompt
        return replace(problem, prompt=prompt)

    def score(self, problem: Problem, text: str) -> Score:
        predicted = final_number(text)
        if predicted is None:
            return Score(False, f"no number found, expected {problem.reference}")
        if predicted == _as_number(problem.reference):
            return Score(True, f"predicted {problem.reference}")
        return Score(False, f"predicted {predicted}, expected {problem.reference}")


def final_number(text: str) -> Decimal | None:
    """The number an answer ends with, or None if it holds none at all."""
    _, marker, tail = text.rpartition("####")
    if marker and (number := _as_number(tail)) is not None:
        return number
    boxed = _last_boxed(text)
    if boxed is not None and (number := _as_number(boxed)) is not None:
        return number
    found = _NUMBER.findall(text)
    return _to_decimal(found[-1]) if found else None


def _as_number(text: str) -> Decimal | None:
    """The first number in `text`; what follows it may be a unit or a remark."""
    found = _NUMBER.search(text)
    return None if found is None else _to_decimal(found.group())


def _to_decimal(text: str) -> Decimal:
    return Decimal(text.replace("\u2212", "-").replace("$", "").replace(",", ""))


def _last_boxed(text: str) -> str | None:
    """Content of the last `\\boxed{...}`, with inner braces balanced; an unclosed one reaches to the end."""
    _, marker, tail = text.rpartition("\\boxed{")
    if not marker:
        return None
    depth = 1
    for end, character in enumerate(tail):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            tail = tail[:end]
            break
    # LaTeX writes 1,000 as 1{,}000 and the currency sign as \$
    return tail.replace("{,}", ",").replace("\\$", "$")
