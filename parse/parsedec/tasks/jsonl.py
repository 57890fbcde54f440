"""Tasks read from a local JSONL file, or from the hub if no file is given.

Each line of a file is an object with `id`, `prompt`, `reference` and `meta`. `prompt` is the bare task text without a
chat template, `reference` what a scorer compares answers with, `meta` an object with whatever else the scorer needs.
Other keys are ignored. Rows from the hub are converted to this form (`parsedec.tasks.hub`), and so are lines with a
benchmark's own columns.
"""

from __future__ import annotations

import json
import math
import random
from abc import ABC, abstractmethod
from codecs import BOM_UTF8
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from parsedec.errors import ConfigError, require_number
from parsedec.tasks.base import Problem, Score, TaskDataError
from parsedec.tasks.hub import EVERY_CONFIG, ROWS, Hub

__all__ = ["JsonlTask", "TaskDataError", "lines_of", "read_prompts"]

_FORM = '{"id": text, "prompt": text, "reference": text or number, "meta": object}'


@dataclass(frozen=True, kw_only=True)
class JsonlTask(ABC):
    """Problems `offset .. offset + n - 1` of a local file or of the hub; `n=None` takes all from `offset` on.

    name     the task's name
    path     local JSONL file; None: from the hub
    hub      the dataset on the hub; None: there is only the local file
    shuffle  seed of a random order in which to take problems; None: the order of the source
    """

    references: ClassVar[bool] = True  # whether every problem must have a reference
    name: str
    path: str | Path | None = None
    hub: Hub | None = None
    n: int | None = None
    offset: int = 0
    shuffle: int | None = None

    def __post_init__(self) -> None:
        if self.n is not None:
            require_number("n", self.n, whole=True, low=1)
        require_number("offset", self.offset, whole=True, low=0)
        if self.shuffle is not None:
            require_number("shuffle", self.shuffle, whole=True, low=0)
        if self.path is None and self.hub is None:
            raise ConfigError(
                f"{self.name} has neither path nor hub; expected a local JSONL file (task.path=FILE) or a dataset."
            )
        # checked early, since models take minutes to load and a wrong path should not wait for them
        if self.path is not None and not Path(self.path).expanduser().is_file():
            raise TaskDataError(
                f"path={str(self.path)!r} is not a file; expected JSONL, each line of the "
                f"form {_FORM}. Correct the path or put the file there."
            )

    @property
    def source(self) -> str:
        """Where the problems come from, for messages."""
        return str(self.path) if self.path is not None else f"{self.hub.dataset if self.hub else '?'} on the hub"

    @abstractmethod
    def score(self, problem: Problem, text: str) -> Score: ...

    def prepare(self, problem: Problem) -> Problem:
        """Turn a stored problem into the one to ask: word the prompt, and check what the scorer needs."""
        return problem

    def counts(self, problem: Problem) -> bool:
        """Whether to ask a stored problem at all."""
        return True

    def problems(self) -> list[Problem]:
        every = self.hub.problems() if self.path is None and self.hub is not None else self._read()
        stored = [problem for problem in every if self.counts(problem)]
        if self.shuffle is not None:
            random.Random(self.shuffle).shuffle(stored)
        if not stored:
            raise TaskDataError(f"{self.source} holds no problems for {self.name}; expected at least one.")
        stop = len(stored) if self.n is None else self.offset + self.n
        if stop > len(stored) or self.offset >= len(stored):
            raise TaskDataError(
                f"offset={self.offset}, n={self.n} asks for more than the {len(stored)} "
                f"problems of {self.source}; expected offset + n <= {len(stored)}. "
                "Lower n or offset."
            )
        return [self.prepare(problem) for problem in stored[self.offset : stop]]

    def _read(self) -> list[Problem]:
        """All problems of the file."""
        problems: list[Problem] = []
        line_of: dict[str, int] = {}
        assert self.path is not None
        for number, line in lines_of(Path(self.path).expanduser()):
            where = f"{self.path}, line {number}"
            problem = self._parse(line, where, len(problems))
            first = line_of.setdefault(problem.id, number)
            if first != number:
                raise TaskDataError(
                    f"{where} repeats the id {problem.id!r} of line {first}; expected "
                    "every id once: results are filed under it. Rename one of the two."
                )
            problems.append(problem)
        return problems

    def _parse(self, line: bytes, where: str, number: int) -> Problem:
        """The problem in a line; `number`, its place among the file's problems, is for the id of one with the hub's
        columns."""
        row = json_object(line, where, _FORM)
        ours = row if self.references else row | {"reference": ""}
        wrong = [key for key, ok in _checks(ours).items() if not ok]
        if not wrong:
            return Problem(id=row["id"], prompt=row["prompt"], reference=str(ours["reference"]), meta=row["meta"])
        other = ""
        if self.hub is not None:
            try:
                config = self.hub.config or ""
                problem = ROWS[self.hub.rows](row, number, config if config != EVERY_CONFIG else "")
                if isinstance(problem.prompt, str):
                    return problem
                raise TypeError(f"{problem.prompt!r} is not text")
            except (KeyError, IndexError, TypeError, ValueError) as bad:
                other = f", or {self.hub.rows}'s columns on the hub ({type(bad).__name__}: {bad})"
        raise TaskDataError(
            f"{where}: {', '.join(wrong)} missing or of the wrong type in {_shorten(line)}; "
            f"expected {_FORM}{other}. Repair or remove the line."
        )


def lines_of(file: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a file that are not blank, with their numbers, which count blank lines as editors do. A byte order
    mark (U+FEFF) at the beginning is dropped."""
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            told = line.removeprefix(BOM_UTF8) if number == 1 else line
            if told.strip():
                yield number, told


def read_prompts(path: str | Path) -> list[Problem]:
    """Problems made of the `prompt` in every line of a JSONL file, and of its `reference`, if any; ignores other keys.

    Raises TaskDataError if the file is missing or a line has no prompt.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise TaskDataError(f'prompts={str(path)!r} is not a file; expected JSONL with a "prompt" in every line.')
    problems = []
    for number, line in lines_of(file):
        where, form = f"{path}, line {number}", '{"prompt": text, "reference": text or number, or absent}'
        row = json_object(line, where, form)
        prompt, reference = row.get("prompt"), row.get("reference")
        if not isinstance(prompt, str) or not prompt:
            raise TaskDataError(f'{where} has no "prompt" with text in it: {_shorten(line)}.')
        if reference is not None and not _is_reference(reference):
            raise TaskDataError(f"{where} has reference={reference!r}; expected {form}. Repair or remove the line.")
        reference = "" if reference is None else str(reference)
        problems.append(Problem(id=f"{file.name}/{number}", prompt=prompt, reference=reference))
    return problems


def json_object(line: bytes, where: str, form: str) -> dict[str, Any]:
    """The JSON object in a line. Raises TaskDataError that says where the line is and what form was expected."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as bad:  # also for numbers too long and lists too deep for Python
        raise TaskDataError(
            f"{where} is not JSON in UTF-8 ({bad}): {_shorten(line)}; expected {form}. Repair or remove the line."
        ) from bad
    if not isinstance(row, dict):
        raise TaskDataError(f"{where} holds {_shorten(line)}; expected an object {form}. Repair or remove the line.")
    return row


def _checks(row: dict[str, Any]) -> dict[str, bool]:
    return {
        "id": isinstance(row.get("id"), str) and bool(row["id"]),
        "prompt": isinstance(row.get("prompt"), str) and bool(row["prompt"]),
        "reference": _is_reference(row.get("reference")),
        "meta": isinstance(row.get("meta"), dict),
    }


def _is_reference(value: object) -> bool:
    """Whether it can be compared with an answer: text, or a finite number."""
    return (isinstance(value, str | int) and not isinstance(value, bool)) or (
        isinstance(value, float) and math.isfinite(value)
    )


def _shorten(line: bytes, width: int = 120) -> str:
    told = line.decode(errors="replace").strip()
    text = "".join(c if c.isprintable() else "\ufffd" for c in told)  # a terminal would obey control characters
    return text if len(text) <= width else text[:width] + " ..."
