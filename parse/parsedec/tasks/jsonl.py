"""Tasks read from a local JSONL file: one object a line with `id`, `prompt`, `reference` and `meta`.

`prompt` is the bare task text without a chat template, `reference` what a scorer compares with, `meta` an
object with whatever else the scorer needs. Other keys are allowed and ignored.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from parsedec.errors import ParsedecError
from parsedec.tasks.base import Problem, Score, require_int

_FORM = '{"id": text, "prompt": text, "reference": text or number, "meta": object}'


class TaskDataError(ParsedecError):
    """A task's data file is missing, or a line of it is not of the expected form."""


@dataclass(frozen=True, kw_only=True)
class JsonlTask(ABC):
    """Problems `offset .. offset + n - 1` of a local file; `n=None` takes all from `offset` on."""

    name: ClassVar[str]
    path: str | Path
    n: int | None = None
    offset: int = 0

    def __post_init__(self) -> None:
        if self.n is not None:
            require_int("n", self.n, 1)
        require_int("offset", self.offset, 0)
        # checked before the first read: models take minutes to load, a wrong path should not wait for them
        if not Path(self.path).expanduser().is_file():
            raise TaskDataError(
                f"path={str(self.path)!r} is not a file; expected JSONL, each line of the "
                f"form {_FORM}. Correct the path or put the file there."
            )

    @abstractmethod
    def score(self, problem: Problem, text: str) -> Score: ...

    def prepare(self, problem: Problem) -> Problem:
        """Turn a stored problem into the one that is asked: word the prompt, check what the scorer needs."""
        return problem

    def problems(self) -> list[Problem]:
        stored = self._read()
        stop = len(stored) if self.n is None else self.offset + self.n
        if stop > len(stored) or self.offset >= len(stored):
            raise TaskDataError(
                f"offset={self.offset}, n={self.n} asks for more than the {len(stored)} "
                f"problems of {self.path}; expected offset + n <= {len(stored)}. "
                "Lower n or offset."
            )
        return [self.prepare(problem) for problem in stored[self.offset : stop]]

    def _read(self) -> list[Problem]:
        """All problems of the file. Blank lines are skipped, but counted as an editor counts them."""
        problems: list[Problem] = []
        line_of: dict[str, int] = {}
        with Path(self.path).expanduser().open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                where = f"{self.path}, line {number}"
                problem = _parse(line, where)
                first = line_of.setdefault(problem.id, number)
                if first != number:
                    raise TaskDataError(
                        f"{where} repeats the id {problem.id!r} of line {first}; expected "
                        "every id once: results are filed under it. Rename one of the two."
                    )
                problems.append(problem)
        return problems


def read_prompts(path: str | Path) -> list[Problem]:
    """The `prompt` of every line of a JSONL file, as problems nobody scores; other keys are ignored.

    Raises TaskDataError for a file that is missing or has a line without one.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise TaskDataError(f'prompts={str(path)!r} is not a file; expected JSONL with a "prompt" in every line.')
    problems = []
    for number, line in enumerate(file.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, UnicodeDecodeError) as bad:
            raise TaskDataError(f"{path}, line {number} is not JSON in UTF-8 ({bad}): {_shorten(line)}.") from bad
        prompt = row.get("prompt") if isinstance(row, dict) else None
        if not isinstance(prompt, str) or not prompt:
            raise TaskDataError(f'{path}, line {number} has no "prompt" with text in it: {_shorten(line)}.')
        problems.append(Problem(id=f"{file.name}/{number}", prompt=prompt, reference=""))
    return problems


def _object(line: bytes, where: str, form: str) -> dict[str, Any]:
    """The JSON object of a line."""
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError) as bad:
        raise TaskDataError(
            f"{where} is not JSON in UTF-8 ({bad}): {_shorten(line)}; expected {form}. Repair or remove the line."
        ) from bad
    if not isinstance(row, dict):
        raise TaskDataError(f"{where} holds {_shorten(line)}; expected an object {form}. Repair or remove the line.")
    return row


def _parse(line: bytes, where: str) -> Problem:
    row = _object(line, where, _FORM)
    wrong = [key for key, ok in _checks(row).items() if not ok]
    if wrong:
        raise TaskDataError(
            f"{where}: {', '.join(wrong)} missing or of the wrong type in {_shorten(line)}; "
            f"expected {_FORM}. Repair or remove the line."
        )
    return Problem(id=row["id"], prompt=row["prompt"], reference=str(row["reference"]), meta=row["meta"])


def _checks(row: dict[str, Any]) -> dict[str, bool]:
    reference = row.get("reference")
    return {
        "id": isinstance(row.get("id"), str) and bool(row["id"]),
        "prompt": isinstance(row.get("prompt"), str) and bool(row["prompt"]),
        "reference": isinstance(reference, str | int | float) and not isinstance(reference, bool),
        "meta": isinstance(row.get("meta"), dict),
    }


def _shorten(line: bytes, width: int = 120) -> str:
    text = line.decode(errors="replace").strip()
    return text if len(text) <= width else text[:width] + " ..."
