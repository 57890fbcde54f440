"""Your own prompts: a JSONL file with a `prompt` in each line, and a `reference` where the right answer is known."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from parsedec.peers.equivalence import SameNumber
from parsedec.tasks.base import Problem, Score
from parsedec.tasks.jsonl import JsonlTask, read_prompts


@dataclass(frozen=True, kw_only=True)
class Prompts(JsonlTask):
    """An answer is right if its last number is that of the reference, or if it is the same text. Without a reference it
    is not scored."""

    references: ClassVar[bool] = False
    name: str = "prompts"

    def score(self, problem: Problem, text: str) -> Score:
        if not problem.reference:
            return Score(None, "not scored")
        same = SameNumber().compare(problem.reference, text).score > 0
        return Score(same, f"expected {problem.reference}")

    def _read(self) -> list[Problem]:
        assert self.path is not None
        return read_prompts(self.path)
