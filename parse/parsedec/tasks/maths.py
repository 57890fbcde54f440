"""Problems with a mathematical answer, such as GSM8K (arXiv 2110.14168) and MATH-500 (arXiv 2103.03874, 2305.20050).

math-verify finds and compares answers: the last boxed or otherwise announced expression of the text must equal the
reference as mathematics, not as text. Where references are numbers, a number marked `#### N`, GSM8K's own form, has
precedence if only units follow it on its line; and per cent signs are ignored: 50 is 50 %.
"""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from parsedec.tasks.base import Problem, Score, TaskDataError, require_extra
from parsedec.tasks.jsonl import JsonlTask

_SECONDS = 5  # for reading an answer, and again for comparing it: symbolic mathematics can take forever
# `#### 1. Cost` is a heading, `#### 20 - 25` a range: a number is an answer only if it ends its line, units aside
_MARKED = re.compile(
    r"""(?mx) \#\#\#\# [\s*_~\u2248+]*
    ([-\u2212]?\s*(?:\\?\$|\\\()?\s*[-\u2212]? (?:[0-9][0-9,]*(?:\.[0-9]+)? | \.[0-9]+))
    (?:[ \t*_$\u20ac\u00a3\u00b0)\]}] | \\[$)\],;])*+                   # what closes a formula, and currencies
    (?:(?:(?:\(|\\(?:text|mathrm)\{)\ *)?                               # "18 dollars", "18 km/h", "18 USD"
       (?!(?:to|or|and|plus|minus|times|over|out|divided|x)\b) (?:[a-z]+|[A-Z]{2,5})\b
       (?:\^\{?[0-9] | (?<=for[ ])[0-9]+ | [^0-9=+(\n])*+                # "cm^2", "for 3 people"
    )?
    (?:\([^()\n]*+\))?                                                  # "(9 eggs x 2)"
    [ \t*_$.!\#]*$"""
)
# "\$" is the currency in LaTeX and never opens a formula; "-$5" is a number as well
_CURRENCY = re.compile(r"\\\$|(?<=[-\u2212])\$(?=[0-9.])")
_PERCENT = re.compile(r"\\?%")  # math-verify reads "\boxed{50%}" as 1/2, and "50%" as 1/2 or 50


@dataclass(frozen=True, kw_only=True)
class Maths(JsonlTask):
    """Problems whose `reference` is a number or a LaTeX expression.

    instruction  appended to each question after an empty line; "": nothing
    numbers      whether every reference is a number, so that answers may be marked as `#### N`
    """

    instruction: str = "Reason step by step, and put your final answer within \\boxed{}."
    numbers: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require_extra("math_verify", f"scoring {self.name}")

    def prepare(self, problem: Problem) -> Problem:
        parsed = self._gold(problem)
        if not parsed or (self.numbers and not getattr(parsed[0], "is_number", False)):
            raise TaskDataError(
                f"{self.source}: problem {problem.id!r} has reference={problem.reference!r}; expected a "
                f"{'number' if self.numbers else 'mathematical expression'}. Is this another benchmark's file? "
                "Change path, or repair the line."
            )
        prompt = f"{problem.prompt}\n\n{self.instruction}" if self.instruction else problem.prompt
        return replace(problem, prompt=prompt)

    def score(self, problem: Problem, text: str) -> Score:
        from math_verify import verify  # here, since importing it takes a second and not every run needs it

        expected = f"expected {problem.reference}"
        predicted = self._answer(text)
        if not predicted:
            return Score(False, f"no answer found, {expected}")
        shown = str(predicted[-1])[:80]
        if verify(self._gold(problem), predicted, timeout_seconds=_time_limit()):
            return Score(True, f"predicted {shown}")
        return Score(False, f"predicted {shown}, {expected}")

    def _gold(self, problem: Problem) -> list[Any]:
        """The reference: a plain number, or LaTeX without its dollars."""
        return _remembered(_PERCENT.sub("", problem.reference) if self.numbers else f"${problem.reference}$")

    def _answer(self, text: str) -> list[Any]:
        """What math-verify reads in a text: the expression, and how it was written. It takes boxes near each other as
        one answer with several values; if answers are numbers, only the last box is kept."""
        if self.numbers:
            before, box, last = _PERCENT.sub("", text).rpartition("\\boxed")
            text = before.replace("\\boxed", "") + box + last
        marked = _MARKED.findall(text) if self.numbers else []
        said = re.sub(r"[\s\\$(,]", "", marked[-1]) if marked else _CURRENCY.sub("", text)
        return _parsed(said.replace("\u2212", "-"))


def _parsed(text: str) -> list[Any]:
    from math_verify import parse

    return list(parse(text, parsing_timeout=_time_limit()))


@lru_cache(maxsize=4096)
def _remembered(reference: str) -> list[Any]:
    return _parsed(reference)


def _time_limit() -> int | None:
    """Seconds after which math-verify stops. It uses a signal, which only the main thread may set; elsewhere None."""
    return _SECONDS if threading.current_thread() is threading.main_thread() else None
