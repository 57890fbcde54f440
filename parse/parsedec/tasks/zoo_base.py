"""What the zoo's tasks share: distinct problems of one split, and answers that a program checks line by line.

A line is right exactly if it is one of the task's wordings with the right values in it, so a checker needs no parser:
it writes the right lines and looks for the given one among them.

Splits are disjoint by construction: a hash of a problem's facts (not of its wording) decides its split, and a task
draws problems until it has enough of its own split. So a model trained on `split=train` has never seen the facts of a
calibration or test problem, whatever the seeds.
"""

from __future__ import annotations

import hashlib
import json
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from parsedec.errors import ConfigError, require_number
from parsedec.tasks.base import Problem, Score

SPLITS = {"train": range(80), "calibration": range(80, 90), "test": range(90, 100)}  # buckets out of 100
MAX_STEPS = 8
LEADS = ("", "", "Next, ", "Then, ", "So, ", "Now, ")  # "" twice: a third of the lines start without a lead
# After this many draws in a row without a new problem, the space counts as exhausted. A small split (a tenth of
# all draws) with a tenth of it still unseen would be given up by mistake once in 10^8 tries.
_BARREN_DRAWS = 2_000

# The right lines in place of a given one. A task that leaves the choice of a word to the writer takes it from there.
RightLines = Callable[[str], Collection[str]]


@dataclass(frozen=True, slots=True)
class Fault:
    """Where an answer goes wrong.

    line  the first line (0-based) that is wrong, superfluous or missing
    at    offset of the first character at which the answer departs from every right one; the length of the text if it
          ends too early
    """

    line: int
    at: int


@dataclass(frozen=True, kw_only=True)
class ZooTask(ABC):
    """`n` distinct problems of one split; the first k are the same for every `n`.

    operations  fewest and most steps of a problem
    max_number  largest number that occurs
    """

    name: ClassVar[str]
    answer: ClassVar[str] = "number"  # what the last line gives, for messages
    n: int = 200
    split: str = "test"
    seed: int = 0
    operations: Sequence[int] = (2, 5)
    max_number: int = 99

    def __post_init__(self) -> None:
        require_number("n", self.n, whole=True, low=1)
        require_number("seed", self.seed, whole=True, low=0)
        require_number("max_number", self.max_number, whole=True, low=10, high=9999)
        if self.split not in SPLITS:
            raise ConfigError(
                f"split={self.split!r} does not exist; expected one of {', '.join(SPLITS)}. Change split."
            )
        require_range("operations", self.operations, 1, MAX_STEPS, "[fewest, most] steps, such as [2, 5]")

    @abstractmethod
    def draw(self, rng: random.Random) -> Problem:
        """A random problem of any split."""

    @abstractmethod
    def split_of(self, meta: Mapping[str, Any]) -> str:
        """The split a problem belongs to, by its facts."""

    @abstractmethod
    def fault(self, meta: Mapping[str, Any], text: str) -> Fault | None:
        """As `first_fault`."""

    @abstractmethod
    def final_answer(self, text: str) -> str | None:
        """The last answer that the text gives, in the form of a reference; None if it gives none."""

    def problems(self) -> list[Problem]:
        rng = random.Random(self.seed)
        found: dict[str, Problem] = {}
        barren = 0
        while len(found) < self.n:
            problem = self.draw(rng)
            if self.split_of(problem.meta) == self.split and problem.prompt not in found:
                found[problem.prompt] = problem
                barren = 0
                continue
            barren += 1
            if barren == _BARREN_DRAWS:
                raise ConfigError(
                    f"n={self.n} is more than the {len(found)} different problems found for "
                    f"{self}; expected at most as many. Lower n or widen operations."
                )
        return list(found.values())

    def score(self, problem: Problem, text: str) -> Score:
        """Right if every line is, including the last. The detail counts lines from 1."""
        fault, given = self.fault(problem.meta, text), self.final_answer(text)
        if given is None:
            final = f"no final answer, expected {problem.reference}"
        elif given == problem.reference:
            final = f"final {self.answer} {given} is right"
        else:
            final = f"predicted {given}, expected {problem.reference}"
        if fault is None:
            return Score(True, f"all lines are right; {final}")
        lines = split_lines(text)
        what = f"is wrong: {lines[fault.line][:60]!r}" if fault.line < len(lines) else "is missing"
        return Score(False, f"line {fault.line + 1} {what}; {final}", fault.line, fault.at)


def require_range(name: str, value: Sequence[int], low: int, high: int, expected: str) -> None:
    """Raise ConfigError for a setting that is not [fewest, most] with low <= fewest <= most <= high."""
    if not isinstance(value, Sequence) or len(value) != 2:
        raise ConfigError(f"{name}={value!r} is not usable; expected {expected}. Change {name}.")
    require_number(f"{name}[0]", value[0], whole=True, low=low, high=high)
    require_number(f"{name}[1]", value[1], whole=True, low=value[0], high=high)


def split_by(facts: Any) -> str:
    """The split of a problem about `facts` (JSON-serialisable)."""
    key = json.dumps(facts).encode()
    bucket = int.from_bytes(hashlib.sha256(key).digest()[:8], "big") % 100
    return next(split for split, buckets in SPLITS.items() if bucket in buckets)


def problem_id(task: str, split: str, prompt: str) -> str:
    """The id of a problem; a prompt gets the same one in every run."""
    return f"{task}/{split}/{hashlib.sha256(prompt.encode()).hexdigest()[:12]}"


def require_line(error_at: int | None, steps: int) -> None:
    """Raise ValueError if an answer of `steps` steps and a last line has no line `error_at`."""
    if error_at is not None and not 0 <= error_at <= steps:
        raise ValueError(
            f"error_at={error_at} is not a line of an answer with {steps + 1} lines; "
            f"expected 0 to {steps}, or None for no error. Change error_at."
        )


def split_lines(text: str) -> list[str]:
    # white space at the end of a text is a habit of models, not a mistake; an empty line inside is a wrong line
    return [line.rstrip() for line in text.rstrip().split("\n")] if text.strip() else []


def first_fault(text: str, rights: Iterable[RightLines]) -> Fault | None:
    """The first line of `text` that is wrong, superfluous or missing; None if all are right and none is missing.

    rights  for every line of a complete answer, its right versions

    A prefix of k whole lines is right exactly if there is no fault or its line is at least k.
    """
    lines, count = split_lines(text), 0
    for right in rights:
        if count == len(lines) or lines[count] not in right(lines[count]):
            return Fault(count, _departure(text, count, right))
        count += 1
    return Fault(count, _departure(text, count, None)) if count < len(lines) else None


def _departure(text: str, line: int, right: RightLines | None) -> int:
    """Offset at which the line stops being the beginning of a right one; if it is superfluous, where it starts."""
    lines = text.split("\n")
    start = sum(len(one) + 1 for one in lines[:line])
    written = lines[line] if line < len(lines) else ""
    # a line that only ends too early is wrong at its line break
    shared = max(_agreement(written, one) for one in right(written)) if right else 0
    return min(len(text), start + shared)


def _agreement(a: str, b: str) -> int:
    """Number of leading characters that two texts share."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def join(lead: str, sentence: str) -> str:
    """A sentence after one of LEADS."""
    return lead + sentence[0].lower() + sentence[1:] if lead else sentence


def slip(rng: random.Random, number: int) -> int:
    """A number other than `number`, as a careless writer might put it: near, a digit changed, or far off."""
    while True:
        digits = list(str(number))
        how = rng.choices(("near", "digit", "far"), weights=(45, 35, 20))[0]
        if how == "near":
            slipped = number + rng.choice((1, -1, 10, -10))
        elif how == "digit":
            digits[rng.randrange(len(digits))] = str(rng.randrange(10))
            slipped = int("".join(digits))
        else:
            slipped = number + rng.randint(-50, 50)
        if slipped >= 0 and slipped != number:
            return slipped
