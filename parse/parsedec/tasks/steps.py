"""Solutions with the first wrong step marked: reading such files, and finding where their steps end.

Each line of the JSONL file is an object in the form of ProcessBench (arXiv 2412.06559)

    {"problem": text, "steps": [text, …], "label": index of the first wrong step, or -1}

or in that of our tasks: `prompt`, `meta.steps`, and the label as `reference` or `meta.first_wrong_step`. A line without
an `id` is identified by its number. ProcessBench has several solutions per problem.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from parsedec.tasks.base import Problem, Score
from parsedec.tasks.jsonl import JsonlTask, TaskDataError, json_object, lines_of
from parsedec.text.spelling import Draft

STEP_FORM = '{"problem": text, "steps": [text, …], "label": first wrong step or -1}'
BETWEEN = "\n\n"  # joins the steps of a file


def read_steps(path: str | Path) -> Iterator[Problem]:
    """The solutions as problems: `meta.steps` holds the steps, `reference` the label. Raises TaskDataError that names
    the offending line."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise TaskDataError(f"steps={str(path)!r} is not a file; expected JSONL, each line {STEP_FORM}.")
    seen: dict[str, int] = {}
    for number, line in lines_of(file):
        problem = _solution(line, f"{path}, line {number}", f"{file.name}/{number}")
        if (first := seen.setdefault(problem.id, number)) != number:
            raise TaskDataError(f"{path}, line {number} repeats the id {problem.id!r} of line {first}.")
        yield problem


def _solution(line: bytes, where: str, name: str) -> Problem:
    row = json_object(line, where, STEP_FORM)
    meta = row.get("meta") or {}
    if not isinstance(meta, dict):
        raise TaskDataError(f"{where} has meta={meta!r}; expected {STEP_FORM}.")
    text: Any = row.get("problem", row.get("prompt"))
    steps: Any = row.get("steps", meta.get("steps"))
    label = row.get("label", meta.get("first_wrong_step", row.get("reference")))
    good = isinstance(text, str) and text and isinstance(steps, list) and steps
    if not good or not all(isinstance(step, str) and step.strip() for step in steps):
        raise TaskDataError(f"{where} has no problem with steps in it; expected {STEP_FORM}.")
    if isinstance(label, bool) or str(label) not in {str(i) for i in range(-1, len(steps))}:
        raise TaskDataError(f"{where} has label={label!r} for {len(steps)} steps; expected {STEP_FORM}.")
    return Problem(id=str(row.get("id", name)), prompt=text, reference=str(label), meta={"steps": steps})


def step_ends(draft: Draft, problem: Problem, separator: str = BETWEEN) -> dict[int, bool]:
    """The token positions in `draft`, the solution's text, at which steps end, and whether the prefix up to each is
    right. A step without a token of its own shares its cut with the one before; the later verdict counts."""
    steps: Sequence[Any] = problem.meta["steps"]
    wrong, right = int(problem.reference), dict[int, bool]()
    for i, stop in enumerate(accumulate(len(step) + len(separator) for step in steps)):
        end = max(1, min(stop - len(separator), len(draft.text)))
        cut = draft.position(end) if i < len(steps) - 1 else len(draft.tokens)
        right[cut] = wrong < 0 or i < wrong
    return right


@dataclass(frozen=True, kw_only=True)
class StepFile(JsonlTask):
    """Such a file as a task. The answer is the index of the first wrong step, or -1 if all are right."""

    name: str = "steps"

    def score(self, problem: Problem, text: str) -> Score:
        return Score(text.strip() == problem.reference, f"said {text.strip()!r}, expected {problem.reference}")

    def _read(self) -> list[Problem]:
        assert self.path is not None
        return list(read_steps(self.path))
